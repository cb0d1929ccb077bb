"""The cost model: learns what steps cost, whatever else happens to the process."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.stepfit import Step

BASE_S, TOKEN_S, PAIR_S, KV_S = 0.025, 2e-4, 2e-9, 5e-8


def seconds(step: Step) -> float:
    return BASE_S + TOKEN_S * step.new + PAIR_S * step.pairs + KV_S * step.kv


def some_steps(count: int, prefill_share: float = 0.3, seed: int = 1) -> list[Step]:
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        running = rng.randint(1, 30)
        kv = running * rng.randint(1_000, 40_000)
        if rng.random() < prefill_share:
            chunk, before = rng.randint(100, 2_000), rng.randint(0, 60_000)
            pairs = chunk * before + chunk * chunk // 2 + kv
            out.append(Step(running + chunk, pairs, kv + before + chunk))
        else:
            out.append(Step(running, kv, kv))
    return out


@pytest.mark.parametrize("disturbed", [False, True])
def test_it_learns_the_machine(disturbed: bool) -> None:
    cost, rng = CostModel(), random.Random(3)
    for step in some_steps(2_000):
        took = seconds(step) * rng.uniform(0.95, 1.05)
        if disturbed and rng.random() < 0.03:
            took += rng.uniform(0.2, 3.0)
        cost.observe(step, took, took)
    for tokens in (2_000, 20_000, 60_000):
        whole = TOKEN_S * tokens + PAIR_S * tokens * tokens / 2
        assert cost.prefill_s(tokens) == pytest.approx(whole, rel=0.15)


def test_it_follows_a_machine_that_changes() -> None:
    cost = CostModel()
    for factor in (1.0, 3.0):
        for step in some_steps(6_000):
            cost.observe(step, factor * seconds(step), 1.0)
    assert cost.prefill_s(10_000) == pytest.approx(
        3 * (TOKEN_S * 10_000 + PAIR_S * 10_000**2 / 2), rel=0.15
    )


def test_what_is_spare() -> None:
    reading, computing, idle = CostModel(), CostModel(), CostModel()
    for step in some_steps(500):
        for cost in (reading, computing, idle):
            cost.observe(step, seconds(step), 0.01)
    one, full = Step(1, 2_000, 2_000), Step(8_000, 40_000_000, 10_000)
    for _ in range(1_000):
        reading.observe(one, seconds(one), seconds(one))
        computing.observe(full, seconds(full), seconds(full))
        idle.observe(full, seconds(full), seconds(full))
        idle.observe_idle(seconds(full))
    assert reading.spare > 0.95
    assert computing.spare < 0.1
    assert idle.spare == pytest.approx(0.5, abs=0.1)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10_000), st.integers(0, 10**9), st.integers(0, 10**6),
            st.floats(-1.0, 1e4),
        ),
        max_size=80,
    )
)  # fmt: skip
def test_nothing_it_sees_makes_it_absurd(seen) -> None:
    cost = CostModel()
    for new, pairs, kv, took in seen:
        cost.observe(Step(new, pairs, kv), took, took)
        cost.observe_idle(-took)
        assert 0.0 <= cost.spare <= 1.0
        assert 0.0 <= cost.prefill_s(1_000) <= cost.prefill_s(50_000) < float("inf")
