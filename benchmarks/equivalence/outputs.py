"""The harness against stock alone, stock under pressure and saga under pressure: same answers?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.equivalence import compare, harness, observe, tasks
from benchmarks.live.process import ServerError
from benchmarks.live.server import Server, ServerOptions, tiny_server
from benchmarks.soak.agents import Agents, Caller, Pace

#: Holds end soon, in mid-task at once: calls enter a pool that is full, and saga preempts, too.
_SETTINGS = {
    "max_hold_s": 3.0, "max_step_hold_s": 0.5, "session_idle_s": 60.0, "log_interval_s": 0,
    "tenant_source": "saga_tenant",
}  # fmt: skip
#: Seconds of agents before the harness begins.
_LEAD_S = 3.0
#: Documents of which it is looked at whether their answers depend on the beginning.
_LOOKED_AT = 6

Say = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    name: str
    scheduler: str
    pressed: bool


ARMS = (
    Arm("stock-alone", "stock", False),
    Arm("stock-pressed", "stock", True),
    Arm("saga-pressed", "saga", True),
)


@dataclass(frozen=True)
class Plan:
    """documents: of each task. blocks: of the KV pool. concurrent: calls of the harness at once,
    of each of its parts, where there is pressure. calls_per_s: that agents begin at most.
    """

    model: Path
    output: Path
    documents: int
    lanes: int
    calls_per_s: float
    concurrent: int = 8
    blocks: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Of one arm. results: by the name of the harness' part; agents: what became of their calls;
    insensitive: answers that stay the same when their prompts' first word changes, None if that was
    not looked at.
    """

    arm: Arm
    results: Mapping[str, compare.Results]
    seen: observe.Seen
    agents: Mapping[str, int]
    took_s: float
    insensitive: int | None = None


def options(plan: Plan, events: str) -> ServerOptions:
    """Of every arm: they differ in --scheduler-cls alone."""
    return tiny_server(
        plan.model, plan.blocks, "--load-format", "safetensors", "--kv-events-config", events,
        "--middleware", "vllm_saga.server.SessionHeaders",
        "--additional-config", json.dumps({"saga": _SETTINGS}),
        env={"VLLM_PLUGINS": "saga"},
    )  # fmt: skip


async def run(plan: Plan, say: Say) -> list[Outcome]:
    """All arms, one after the other.

    Raises:
        ServerError: a server or the harness has failed.
        NoSamples: the harness has left nothing.
    """
    say("lm-evaluation-harness: installing, unless it is there")
    executable = await harness.install()
    made = tasks.write(plan.output / "tasks", plan.documents, plan.seed)
    outcomes = []
    for arm in ARMS:
        say(f"{arm.name}: starting its server")
        outcomes.append(await _run_arm(arm, plan, executable, made, say))
        say(f"{arm.name}: {outcomes[-1].took_s:.0f} s, {_happened(outcomes[-1].seen)}")
    return outcomes


async def _run_arm(arm: Arm, plan: Plan, executable: Path, made: Path, say: Say) -> Outcome:
    folder = plan.output / arm.name
    events, config = observe.event_port()
    vllm = Path(sys.executable).with_name("vllm")
    server = Server(options(plan, config), arm.scheduler, folder / "server.log", vllm)

    async def part(wanted: harness.Part, concurrent: int) -> compare.Results:
        at = folder / wanted.name
        found = await harness.run(wanted, executable, server.url, plan.model, made, at, concurrent)
        say(f"{arm.name}: {wanted.name}: {len(found.samples)} samples")
        return found

    results: dict[str, compare.Results] = {}
    insensitive = None
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with server, aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        caller = Caller(http, server.url, Pace(plan.calls_per_s))
        began = time.monotonic()
        async with observe.Watch(http, server.url, events, arm.scheduler) as watch:
            if arm.pressed:
                async with _agents(caller, plan):
                    parts = (part(wanted, plan.concurrent) for wanted in harness.PARTS)
                    found = await _all_or_first_error(list(parts))
                results = {p.name: r for p, r in zip(harness.PARTS, found, strict=True)}
            else:
                for wanted in (p for p in harness.PARTS if not p.named):
                    results[wanted.name] = await part(wanted, 1)
                insensitive = await _count_insensitive(http, server.url, plan)
        took_s = time.monotonic() - began
    if watch.seen is None:
        raise ServerError(f"{arm.name}: its server does not tell what has happened on it")
    if caller.counts["failed"]:
        raise ServerError(f"{arm.name}: a call of the agents has failed: {caller.errors[0]}")
    return Outcome(arm, results, watch.seen, dict(caller.counts), took_s, insensitive)


async def _count_insensitive(http: aiohttp.ClientSession, url: str, plan: Plan) -> int:
    """Of a few documents, whose answer does not depend on the first word of its prompt?

    Wrong KV of a common beginning would go unnoticed in those.
    """

    async def answer(prompt: str) -> str:
        body = {
            "model": "model", "prompt": prompt, "max_tokens": tasks.ANSWER_TOKENS,
            "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        async with http.post(f"{url}/v1/completions", json=body) as told:
            told.raise_for_status()
            found: str = (await told.json())["choices"][0]["text"]
            return found

    count = 0
    for document in tasks.documents(plan.documents, plan.seed)[tasks.TEXT][:_LOOKED_AT]:
        prompt: str = document["prompt"]
        count += await answer(prompt) == await answer(f"tool{prompt.removeprefix('user')}")
    return count


async def _all_or_first_error(
    parts: Sequence[Any],
) -> list[compare.Results]:
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(part) for part in parts]
    except* (ServerError, compare.NoSamples) as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


@contextlib.asynccontextmanager
async def _agents(caller: Caller, plan: Plan) -> AsyncIterator[None]:
    """Agents of every kind, from a little before until the end."""
    running = asyncio.create_task(Agents(caller, plan.seed).run(plan.lanes, asyncio.Event()))
    try:
        await asyncio.sleep(_LEAD_S)
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """What is not the same, and what pressure there was not; empty if the answers are the same.

    The reference is the first arm.
    """
    reference, *others = outcomes
    found = [line for o in others for line in observe.missing(o.seen, o.arm.scheduler)]
    if reference.insensitive:
        found.append(f"{reference.insensitive} answers do not depend on their prompt's first word")
    for outcome in others:
        for name, results in outcome.results.items():
            lines = compare.differences(_expected(reference, name), results)
            found += [f"{outcome.arm.name}: {name}: {line}" for line in lines]
    return found


def _expected(reference: Outcome, part: str) -> compare.Results:
    """What a part should answer: with a session id the same as without."""
    return reference.results[part.removesuffix(harness.NAMED)]


def document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For the report: counts, scores, and the largest difference of log probabilities, in nats."""
    reference = outcomes[0]
    return {
        "tolerance_nats": compare.TOLERANCE,
        "problems": problems(outcomes),
        "arms": {
            o.arm.name: {
                "took_s": round(o.took_s, 1),
                "seen": asdict(o.seen),
                "agents": dict(o.agents),
                "insensitive": o.insensitive,
                "parts": {
                    name: {
                        "samples": len(results.samples),
                        "largest_gap_nats": compare.largest_gap(
                            _expected(reference, name), results
                        ),
                        "scores": dict(results.scores),
                    }
                    for name, results in o.results.items()
                },
            }
            for o in outcomes
        },
    }


def _happened(seen: observe.Seen) -> str:
    return (
        f"{seen.preemptions} preemptions, {seen.evicted_blocks} evicted blocks, {seen.holds} holds "
        f"({seen.harness_held} of the harness seen)"
    )
