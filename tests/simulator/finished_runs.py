"""Finished runs built by hand, for the tests of what is made of them."""

import math
import random
from collections.abc import Sequence
from typing import Any

from vllm_saga.simulator import trace
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread
from vllm_saga.simulator.result import RunResult, to_json


def session(
    number: int,
    waits: Sequence[float | None] = (1.0,),
    *,
    arrival: float = 0.0,
    service: float = 1.0,
    cached: Sequence[int] | None = None,
    prompt: int = 100,
    new: int = 40,
    output: int = 10,
    tenant: str | None = None,
) -> LiveSession:
    """A chain of calls; call k waits `waits[k]` and then runs `service` seconds, without gaps.

    A wait of None is a call that never got a token: nothing follows it. Call k has
    `prompt * (k + 1)` prompt tokens, of which `new` are new.
    """
    calls = tuple(
        trace.Call(prompt * (k + 1), new_tokens=new, output_tokens=output)
        for k in range(len(waits))
    )
    recorded = trace.Session(f"t{number}", calls, tenant=tenant)
    live = LiveSession(f"t{number}", recorded, number, arrival)
    live.calls = [None] * len(waits)
    thread = Thread(live, None)
    now = arrival
    for k, wait in enumerate(waits):
        call = LiveCall(f"t{number}/{k}", thread, k, issued_s=now, submitted_s=now)
        live.calls[k] = call
        if wait is None:
            return live
        call.cached_tokens = cached[k] if cached else 0
        call.first_token_s = now + wait
        now = call.finished_s = call.first_token_s + service
        live.calls_done += 1
    live.finished_s = now
    return live


def run(
    sessions: list[LiveSession], policy: str = "stock", seed: int = 0, **changes: Any
) -> RunResult:
    """A run whose sessions take 10 s each alone, unless `changes` says otherwise."""
    fields: dict[str, Any] = {
        "isolated_s": {session.id: 10.0 for session in sessions},
        "ended_s": 60.0,
        "kv_capacity_token_s": 1000.0,
        "kv_running_token_s": 500.0,
        "kv_cached_token_s": 300.0,
        "kv_held_hit_token_s": 100.0,
        "preemptions": 3,
        "steps": 200,
        "schedulings": 200,
        "scheduler_s": 0.02,
        "wall_s": 1.5,
    }
    return RunResult(policy, seed, sessions, **fields | changes)


def drawn(policy: str, seed: int, slowness: float, count: int = 40, steps: int = 12) -> RunResult:
    """A run as a busy engine might leave it: waits are log-normal and grow with `slowness`."""
    work = random.Random(f"work/{seed}")
    noise = random.Random(f"{policy}/{seed}")
    sessions = [
        session(
            k,
            [
                work.lognormvariate(-1, 1) * slowness * noise.uniform(0.8, 1.25)
                for _ in range(work.randint(2, steps))
            ],
            arrival=k * 2.0,
            service=1.5,
            cached=[int(100 * i / slowness) for i in range(steps)],
        )
        for k in range(count)
    ]
    ended = max(s.finished_s or 0.0 for s in sessions)
    pool = 100_000
    timeline = [
        (
            ended * i / 500,
            pool * (0.55 + 0.2 * math.sin(i / 30 + slowness)),
            pool * (0.15 + 0.05 * math.sin(i / 11)),
        )
        for i in range(500)
    ]
    return run(
        sessions,
        policy,
        seed,
        isolated_s={s.id: 1.6 * len(s.calls) for s in sessions},
        ended_s=ended,
        kv_capacity_token_s=pool * ended,
        kv_running_token_s=0.55 * pool * ended,
        kv_cached_token_s=0.15 * pool * ended,
        kv_held_hit_token_s=0.15 * pool * ended / slowness,
        preemptions=int(100 * slowness),
        timeline=timeline,
    )


def document(policies: int = 3, seeds: int = 3) -> dict[str, Any]:
    """The report of so many policies, stock the slowest, then saga, then others."""
    names = ["stock", "saga", *(f"policy-{k}" for k in range(policies - 2))]
    runs = [
        drawn(name, seed, 3.0 if k == 0 else 1 + 0.3 * k, count=6)
        for k, name in enumerate(names)
        for seed in range(seeds)
    ]
    return to_json({"trace": "synthetic", "rate": math.inf}, runs, "stock")
