"""What the residents will hold later: exact sums, and what a forecast lets in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.helpers import BLOCK, arrival, make_policy, run_call
from vllm_saga.policy.graph import AgentClass
from vllm_saga.policy.outlook import AHEAD_S, NONE, Outlook

growths = st.lists(
    st.tuples(st.floats(-1e4, 1e4), st.floats(0, 1e6)),
    min_size=len(AHEAD_S),
    max_size=len(AHEAD_S),
)


@given(st.lists(growths, max_size=8), growths, st.floats(-2, 2))
def test_the_sum_over_residents_at_the_worst_time(members, further, z):
    outlook = Outlook()
    for growth in members:
        outlook.replace(None, growth)
    expected = 0.0
    for column in zip(further, *members, strict=True):
        mean, variance = (sum(part) for part in zip(*column, strict=True))
        expected = max(expected, mean + z * variance**0.5)
    assert outlook.most(further, z) == pytest.approx(expected, abs=2.0)


@given(st.lists(growths, min_size=1, max_size=8))
def test_nothing_is_left_of_who_has_gone(members):
    outlook = Outlook()
    for growth in members:
        outlook.replace(None, growth)
    for growth in members:
        outlook.replace(growth, None)
    assert outlook.most(NONE, 2.0) == 0


def grown(calls: int, tokens: int, workflows: int = 50) -> AgentClass:
    """A class whose workflows make `calls` calls of `tokens` tokens, one in ten seconds."""
    agent = AgentClass(AgentClass())
    for _ in range(workflows):
        for number in range(1, calls + 1):
            agent.observe_call(None, None, tokens)
            agent.observe_progress(number)
            agent.observe_cycle(10.0)
        agent.observe_end_after(None, calls)
    return agent


def test_a_workflow_grows_and_then_gives_all_back():
    agent = grown(calls=12, tokens=100)
    soon, late = agent.outlook(2, None, 200, (50.0, 5000.0))
    assert soon[0] == pytest.approx(500, rel=0.15)
    assert late[0] == pytest.approx(-200, rel=0.05)
    declared = agent.outlook(2, 3.0, 200, (20.0, 40.0))
    assert [round(mean) for mean, _ in declared] == [round(2 * agent.growth_tokens), -200]


def test_a_forecast_holds_who_would_outgrow_the_pool_once_its_class_is_known():
    """Three contexts of 10 blocks fit 40 now, but each is known to grow to 30."""

    def admitted(taught: int) -> int:
        policy = make_policy(pool_blocks=40, headroom=0.0, give_up_probability=0.01)
        now = 0.0
        for number in range(taught):
            tokens = list(range(10 * BLOCK))
            for step in range(5):
                now += 10.0
                call = arrival(f"t{number}.{step}", tokens, f"t{number}", last=step == 4)
                tokens = run_call(policy, call, list(range(4 * BLOCK)), now)
        for number in range(3):
            tokens = [number, *range(10 * BLOCK - 1)]
            # What all share is the first block, as for one agent's system prompt.
            tokens[:BLOCK] = range(BLOCK)
            tokens[BLOCK] = 1000 + number
            policy.on_arrival(arrival(f"c{number}", tokens, f"s{number}"), now)
        return sum(not policy.is_held(f"c{number}") for number in range(3))

    assert admitted(taught=0) == 3
    assert admitted(taught=40) < 3


@pytest.mark.parametrize("busy", [True, False])
def test_who_lost_its_place_comes_back_once_there_is_room_to_grow_or_little_runs(busy):
    policy = make_policy(pool_blocks=44, headroom=0.0, give_up_probability=0.01)
    agent = policy.classes.get(("", None))
    for _ in range(60):
        for calls in range(1, 11):
            agent.observe_call(None, None, 2 * BLOCK)
            agent.observe_progress(calls)
            agent.observe_cycle(10.0)
            agent.observe_output(BLOCK)
        agent.observe_end_after(None, 10)

    def call(name: str, blocks: int, step: int, last: bool = False):
        tokens = [len(name), *range(blocks * BLOCK - 1)]
        return arrival(f"{name}.{step}", tokens, name, last=last)

    # Two that grow until the younger has to leave, while the older goes on.
    for name in ("old", "young"):
        run_call(policy, call(name, 14, 0), [], 0.0)
    policy.on_arrival(call("old", 32, 1, last=True), 1.0)
    assert policy.state()["displaced"] == 1
    if busy:
        policy.on_arrival(arrival("plain", [7, 7, 7]), 1.5)
    policy.on_arrival(call("young", 8, 1), 2.0)
    # There is room for what it has now, but not for what it will have.
    residency = policy.residency
    young = residency.first_in_line(2.0)
    assert residency.used_blocks + residency.needed_blocks(young) <= residency.capacity
    assert policy.on_step(2.0) == ([] if busy else ["young.1"])
    policy.on_finish("old.1", 32 * BLOCK, 3.0)
    assert policy.on_step(3.0) == (["young.1"] if busy else [])
