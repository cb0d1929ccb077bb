"""SAGA as published: its formulas, and the graph it learns."""

from __future__ import annotations

import pytest
from agents import SMALL, agent

from vllm_saga.policy.graph import reuse_probability
from vllm_saga.policy.retention.wa_lru import eviction_score, memory_pressure
from vllm_saga.simulator.policies.saga_paper.formulas import COLD_START, P_TERM, ttl_s
from vllm_saga.simulator.policies.saga_paper.graph import AgentType, Histories, Run, tool_of
from vllm_saga.simulator.trace import Call


def test_equations_give_the_published_values():
    assert reuse_probability(900, [(0.75, 100), (0.25, 300)]) == pytest.approx(0.8625)
    assert reuse_probability(0, [(1.0, 100)]) == 0.0
    assert reuse_probability(900, []) == 0.0
    assert eviction_score(0.5, 0.7, 0.5) == pytest.approx(0.3 * 0.5 + 0.5 * 0.3 + 0.2 * 0.5)
    assert [memory_pressure(used) for used in (0.5, 0.7, 0.8, 0.9, 1.0)] == pytest.approx(
        [0.0, 0.0, 0.5, 1.0, 1.0]
    )


def test_time_to_live_is_the_empirical_percentile_less_half_the_pressure():
    hundred = [float(n) for n in range(1, 101)]
    assert ttl_s(hundred, 0.5) == 95.0
    assert ttl_s(hundred, 0.8) == pytest.approx(95.0 * 0.75)
    assert ttl_s([1.0, 2.0, 3.0, 4.0], 0.95) == pytest.approx(2.0)
    assert ttl_s([10_000.0], 0.0) == 300.0
    assert ttl_s([], 0.0) == 0.0


# -- graph ------------------------------------------------------------------------------------


def taught(*runs):
    """An agent type that saw runs, each a list of tools, with 100 new tokens a step."""
    known = AgentType()
    for tools in runs:
        run = Run(())
        for tool in tools:
            if run.tool is not None:
                known.observe_step(run.tool, tool, 100)
            run.tool, run.steps = tool, run.steps + 1
        known.observe_end(run)
    return known


def test_a_confident_successor_makes_a_linear_graph():
    known = taught(*[["read", "edit", "submit"]] * 7, *[["read", "run", "submit"]] * 3)
    assert known.reuse("read", 1, 900) == pytest.approx((1 - P_TERM) * 0.9)
    # Nothing but the end ever follows.
    assert known.reuse("submit", 3, 900) == 0.0


def test_without_a_confident_successor_the_agent_goes_on_as_long_as_steps_are_left():
    known = taught(*[["read", "edit", "submit"]] * 6, *[["read", "run", "submit"]] * 4)
    assert known.steps_left(1) == 2.0
    assert known.reuse("read", 1, 900) == pytest.approx((1 - 1 / 2) * 0.9)
    longer = taught(["read"] + ["edit", "run"] * 5)
    assert longer.steps_left(1) == 10.0
    assert longer.reuse("never seen", 1, 900) == pytest.approx((1 - 1 / 10) * 0.9)


def test_steps_left_are_those_of_runs_that_got_further():
    known = taught(["a"] * 4, ["a"] * 10)
    assert [known.steps_left(done) for done in (0, 4, 9, 10, 50)] == [7.0, 6.0, 1.0, 1.0, 1.0]


def test_nothing_is_known_of_an_agent_before_thirty_of_its_kind_have_ended():
    histories = Histories(SMALL)
    session = agent(0, group="prompt a")
    for _ in range(COLD_START - 1):
        histories.learn(session)
    assert histories.knowledge(histories.begin(session, None)) is None
    histories.learn(session)
    known = histories.knowledge(histories.begin(session, None))
    assert known is not None and known.steps_left(0) == 8.0
    assert known.latencies("bash")[-1] == pytest.approx(0.5)
    # Another prompt of the same product borrows what the product knows; sub-agents do not.
    other = agent(0, group="prompt b")
    assert histories.knowledge(histories.begin(other, None)) is not None
    assert histories.knowledge(histories.begin(other, "sub")) is None


def test_parallel_tools_are_one_kind_of_step():
    call = Call(100, 100, 10, tool="Grep+Bash+Grep")
    assert tool_of(call) == "Bash+Grep"
    assert tool_of(Call(100, 100, 10)) == "NONE"
