"""What keeping KV is worth."""

from __future__ import annotations

import math

import pytest
from helpers import arrival, make_policy, run_call
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.price import Price
from vllm_saga.policy.stepfit import Step

CAPACITY = 100_000


def timed(*, running=4, spare=0.5):
    """A cost model of 1 ms a token whose engine is half busy with `running` calls."""
    cost = CostModel()
    for _ in range(2000):
        cost.observe(Step(10, 100, 100, running), 0.02, 1.0)
    cost.spare = spare
    return cost


def workflow_of(tokens):
    policy = make_policy(pool_blocks=1_000_000)
    run_call(policy, arrival("a", [1] * tokens, "s"), [], 0.0)
    return policy.table.sessions["", "s"].workflow


def test_before_steps_were_timed_nothing_is_given_up():
    assert Price(CostModel(), 0.5, CAPACITY).break_even_s(workflow_of(100), 4) == math.inf


def test_all_patience_keeps_for_ever_and_none_a_quarter_as_long():
    workflow = workflow_of(10_000)
    keeps_s = [Price(timed(), p, CAPACITY).break_even_s(workflow, 4) for p in (0.0, 0.5, 1.0)]
    assert keeps_s[0] == pytest.approx(keeps_s[1] / 4) and keeps_s[2] > 1e6


@given(st.floats(0.05, 0.95), st.integers(1, 50))
def test_the_more_patience_or_the_fewer_residents_the_longer(patience, residents):
    workflow, cost = workflow_of(1000), timed()
    base = Price(cost, patience, CAPACITY).break_even_s(workflow, residents)
    assert Price(cost, min(patience + 0.04, 1.0), CAPACITY).break_even_s(workflow, residents) > base
    assert Price(cost, patience, CAPACITY).break_even_s(workflow, residents + 1) < base


def test_a_prefill_that_slows_many_calls_is_dearer():
    workflow = workflow_of(10_000)
    alone, crowd = timed(running=0), timed(running=9)
    ratio = Price(crowd, 0.5, CAPACITY).break_even_s(workflow, 4) / Price(
        alone, 0.5, CAPACITY
    ).break_even_s(workflow, 4)
    assert ratio > 5.0


def test_what_is_edited_away_is_not_worth_keeping():
    workflow, price = workflow_of(10_000), Price(timed(), 0.5, CAPACITY)
    whole = price.break_even_s(workflow, 4)
    for _ in range(400):
        workflow.agent.observe_reuse(0.25)
    assert 0.2 < price.break_even_s(workflow, 4) / whole < 0.35


def test_the_pool_may_be_short_of_what_costs_less_than_a_hold():
    workflow, cost = workflow_of(1_000), timed(running=4)
    price = Price(cost, 0.5, 10**9, overdraft=2.0)
    tokens = price.overdraft_tokens(workflow, held=0)
    lost_s = tokens * cost.work_s(Step(1, 1_000, 0)) * (1 + 4)
    assert lost_s == pytest.approx(2.0 * 0.5 * workflow.agent.cycle_s, rel=0.02)
    assert Price(cost, 0.5, 10, overdraft=2.0).overdraft_tokens(workflow, 0) == 10


def test_nothing_is_overdrawn_before_steps_were_timed_or_if_so_configured():
    workflow = workflow_of(1_000)
    unknown = Price(CostModel(), 0.5, CAPACITY, overdraft=2.0)
    assert unknown.overdraft_tokens(workflow, 0) == 0
    assert Price(timed(), 0.5, CAPACITY).overdraft_tokens(workflow, 0) == 0


@given(st.integers(0, 4), st.floats(0.1, 0.9))
def test_less_is_overdrawn_where_many_wait_or_the_engine_is_busy(held, spare):
    workflow = workflow_of(1_000)

    def tokens(held, spare):
        price = Price(timed(spare=spare), 0.5, 10**9, overdraft=2.0)
        return price.overdraft_tokens(workflow, held)

    assert tokens(held, spare) > max(tokens(held + 1, spare), tokens(held, spare - 0.05))
