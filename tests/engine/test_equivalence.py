"""Invariants 1 and 7: no pressure, no effect; and what is generated never changes."""

from __future__ import annotations

import dataclasses
import random

import pytest
from vllm.sampling_params import SamplingParams

from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler

VARIANTS = [(False, "fcfs"), (True, "fcfs"), (False, "priority")]


def plain(value):
    """A SchedulerOutput as plain data, every field included."""
    if isinstance(value, SamplingParams):
        return repr(value)
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@dataclasses.dataclass
class Script:
    """What happens before each step: arrivals and aborts, the same for both schedulers."""

    arrivals: dict[int, list[dict]]
    aborts: dict[int, list[str]]
    steps: int


def random_calls(seed, steps, rate, prompt, output):
    rng = random.Random(seed)
    arrivals: dict[int, list[dict]] = {}
    aborts: dict[int, list[str]] = {}
    number = 0
    for step in range(steps):
        for _ in range(rng.choice([0, 0, rate])):
            number += 1
            call = {
                "request_id": f"r{number}",
                "tokens": [rng.randrange(500) for _ in range(rng.randrange(1, prompt))],
                "output": rng.randrange(1, output),
                "priority": rng.randrange(3),
                "arrival_time": float(step),
            }
            arrivals.setdefault(step, []).append(call)
            if rng.random() < 0.1:
                aborts.setdefault(step + rng.randrange(1, 20), []).append(call["request_id"])
    return Script(arrivals, aborts, steps)


def multi_turn(seed, sessions, turns, with_ids, stagger=0):
    """Sessions that call every 12 steps with a longer prompt; each starts `stagger` steps later."""
    rng = random.Random(seed)
    arrivals: dict[int, list[dict]] = {}
    system = [rng.randrange(500) for _ in range(64)]
    contexts = {s: [*system, *(rng.randrange(500) for _ in range(40))] for s in range(sessions)}
    for turn in range(turns):
        for session in range(sessions):
            call = {
                "request_id": f"s{session}t{turn}",
                "tokens": list(contexts[session]),
                "output": 5,
                "session_id": f"s{session}" if with_ids else None,
            }
            step = turn * 12 + session % 7 + session * stagger
            arrivals.setdefault(step, []).append(call)
            contexts[session] += [rng.randrange(500) for _ in range(30)]
    return Script(arrivals, {}, max(arrivals) + 60)


def run_both(script, **options):
    """Run a script on stock and on saga, comparing every SchedulerOutput; returns both drivers."""
    drivers = [Driver(make_scheduler(kind, **options)) for kind in ("stock", "saga")]
    for step in range(script.steps):
        for driver in drivers:
            for call in script.arrivals.get(step, []):
                call = dict(call)
                driver.add(make_request(call.pop("request_id"), **call))
            for request_id in script.aborts.get(step, []):
                driver.abort(request_id)
        stock, saga = (plain(driver.step()) for driver in drivers)
        assert saga == stock, f"step {step}"
        for driver in drivers:
            driver.now += 0.02
    return drivers


@pytest.mark.parametrize("overlapping, policy", VARIANTS)
@pytest.mark.parametrize("blocks", [60, 400])
def test_without_identity_every_step_is_stock_s(overlapping, policy, blocks):
    script = random_calls(seed=blocks, steps=400, rate=2, prompt=400, output=60)
    stock, _ = run_both(
        script, overlapping=overlapping, policy=policy, blocks=blocks, max_num_seqs=24
    )
    assert len(stock.finished) > 40
    if blocks == 60:
        preempted = sum(r.num_preemptions for r in stock.scheduler.requests.values())
        assert preempted or stock.scheduler.waiting, "no pressure: the test would prove little"


@pytest.mark.parametrize("overlapping, policy", VARIANTS)
@pytest.mark.parametrize("with_ids", [True, False])
def test_while_all_fits_every_step_is_stock_s(overlapping, policy, with_ids):
    # The last session starts when the others have grown to three quarters of the pool.
    script = multi_turn(seed=1, sessions=10, turns=12, with_ids=with_ids, stagger=14)
    _, saga = run_both(script, overlapping=overlapping, policy=policy, blocks=420, max_num_seqs=8)
    state = saga.scheduler.saga.state()
    assert len(saga.finished) == 120
    assert state["holds"] == state["displaced"] == 0
    # The sessions were known: neutrality was a decision, not blindness.
    sessions = saga.scheduler.saga.table.sessions.values()
    assert len(sessions) == 10 and all(session.workflow.known for session in sessions)


@pytest.mark.parametrize("overlapping", [False, True])
def test_outputs_are_the_same_under_holds_and_evictions(overlapping):
    script = multi_turn(seed=2, sessions=12, turns=6, with_ids=True)
    outputs = []
    for kind in ("stock", "saga"):
        scheduler = make_scheduler(kind, blocks=60, overlapping=overlapping)
        driver = Driver(scheduler)
        for step in range(script.steps):
            for call in script.arrivals.get(step, []):
                call = dict(call)
                driver.add(make_request(call.pop("request_id"), **call))
            driver.step()
            driver.now += 0.02
        driver.drain(20_000, dt=0.02)
        outputs.append(driver.outputs)
    assert outputs[0] == outputs[1]
    assert scheduler.saga.state()["holds"] > 0


def test_without_prefix_caching_saga_is_off_and_stock_runs(caplog):
    script = random_calls(seed=5, steps=100, rate=1, prompt=200, output=20)
    _, saga = run_both(script, blocks=200, prefix_caching=False)
    assert saga.scheduler.saga is None
