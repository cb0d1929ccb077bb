"""Which sessions of a trace are played, and what is changed about them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.simulator import formats, trace
from vllm_saga.simulator.trace import Call, Session


def small(name: str, context: int = 100, **extra: Any) -> Session:
    calls = (
        Call(context - 20, context - 20, 5, tool_latency_s=90.0, gap="tool"),
        Call(context - 10, 5, 5, gap="human"),
        Call(context - 3, 5, 3, gap="end"),
    )
    return Session(name, calls, **extra)


TRACE = [small(str(k)) for k in range(6)]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=40)
def test_a_population_grows_at_its_end(a: int, b: int, seed: int) -> None:
    few, many = (formats.population(TRACE, n, seed).sessions for n in sorted((a, b)))
    assert many[: len(few)] == few
    assert len({one.session_id for one in many}) == len(many)
    once = [one.session_id for one in many[: len(TRACE)]]
    assert all("~" not in name for name in once)
    assert all("~" in one.session_id for one in many[len(TRACE) :])


def test_seeds_shuffle() -> None:
    orders = {
        tuple(one.session_id for one in formats.population(TRACE, 6, seed).sessions)
        for seed in range(8)
    }
    assert len(orders) > 4
    assert all(sorted(order) == list("012345") for order in orders)


def test_copies_are_numbered_and_arrive_later() -> None:
    timed = [small("a", arrival_s=0.0), small("b", arrival_s=10.0)]
    sessions = formats.population(timed, 40, 1).sessions
    arrivals = {one.session_id: one.arrival_s for one in sessions}
    assert arrivals["a"] == 0.0
    assert (arrivals["b~2"], arrivals["b~3"], arrivals["a~2"]) == (30.0, 50.0, 20.0)


def test_gaps_are_clipped_even_where_they_are_drawn() -> None:
    [session] = formats.population([small("a")], 1, 0, max_gap_s=1e-4).sessions
    assert session.delays_s == (0.0, 1e-4, 1e-4)
    assert session.calls[0].tool_latency_s == 1e-4
    [free] = formats.population([small("a")], 1, 0).sessions
    [loose] = formats.population([small("a")], 1, 0, max_gap_s=3_600).sessions
    assert free == loose == small("a")
    copies = formats.population([small("a")], 5, 0, max_gap_s=30).sessions
    assert all(max(one.delays_s) <= 30 for one in copies)


def test_long_sessions_are_dropped() -> None:
    mixed = [small("a"), small("b", 1_000), small("c")]
    picked = formats.population(mixed, 4, 0, max_context=100)
    assert picked.dropped == 1
    assert {one.session_id[0] for one in picked.sessions} == {"a", "c"}
    with pytest.raises(trace.TraceError, match=r"none of 3 sessions fits 99 .* needs 100"):
        formats.population(mixed, 4, 0, max_context=99)
    with pytest.raises(ValueError, match="count: 0 is not at least 1"):
        formats.population(mixed, 0, 0)
