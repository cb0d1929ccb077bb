"""Plain traffic: requests that are never continued, or by chance, are served as stock serves them.

A pool that holds what runs, several times over, is full before a minute has passed if what nobody
comes back for is kept.
"""

from __future__ import annotations

import random

import pytest
from agents import SMALL

from vllm_saga.simulator import runner
from vllm_saga.simulator.load import Open
from vllm_saga.simulator.result import summarise
from vllm_saga.simulator.trace import Call, Session

COUNT = 700
PER_MINUTE = 400.0  # SMALL bears 500


def call(before: int, new: int, source: random.Random) -> Call:
    return Call(
        prompt_tokens=before + new,
        new_tokens=new,
        output_tokens=source.randint(19, 173),
        tool_latency_s=source.uniform(0.0, 60.0),
        gap="tool",
    )


def requests(continued: float) -> tuple[Session, ...]:
    """Requests of which so large a share is an earlier one and more, a minute apart at most."""
    source = random.Random(3)
    sessions = []
    for number in range(COUNT):
        length = source.randint(44, 396)
        calls = [call(0, length, source)]
        if source.random() < continued:
            calls.append(call(length, source.randint(20, 200), source))
        sessions.append(Session(f"request-{number}", tuple(calls)))
    return tuple(sessions)


@pytest.mark.parametrize("policy, continued", [("saga", 0.0), ("saga", 0.2), ("saga-lineage", 0.2)])
def test_requests_that_hardly_anyone_continues_are_served_as_stock_serves_them(policy, continued):
    asked = runner.Experiment(requests(continued), Open(PER_MINUTE), SMALL, COUNT)
    stock, saga = (summarise(runner.run(asked, name, 0)) for name in ("vllm", policy))
    for share in ("mean", "p99"):
        expected = pytest.approx(stock["task_completion_s"][share], rel=0.03)
        assert saga["task_completion_s"][share] == expected
        expected = pytest.approx(stock["first_wait_s"][share], rel=0.05, abs=0.05)
        assert saga["first_wait_s"][share] == expected
