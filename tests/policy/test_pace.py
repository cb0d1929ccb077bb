"""Prefill beside decodes: what a step computes for nothing, learned from what steps take."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.corner import Corner
from vllm_saga.policy.cost import CostModel, Step
from vllm_saga.policy.pace import prefill_tokens

OVERHEAD_S, READ_S, TOKEN_S = 0.0045, 0.023, 1.9e-4
FREE = READ_S / TOKEN_S  # 121 tokens


def step_s(new: int) -> float:
    """A roofline: reading the weights hides the arithmetic of the first `FREE` tokens."""
    return OVERHEAD_S + max(READ_S, TOKEN_S * new)


def learned(steps: int = 600, noise: float = 0.05, seed: int = 1) -> Corner:
    corner, rng = Corner(), random.Random(seed)
    for _ in range(steps):
        calls = rng.randint(1, 12)
        new = calls if rng.random() < 0.6 else calls + rng.choice((700, 1400, 2036))
        corner.observe(new, calls, step_s(new) * rng.uniform(1 - noise, 1 + noise))
    return corner


@pytest.mark.parametrize("seed", range(5))
def test_the_corner_is_found(seed: int) -> None:
    corner = learned(seed=seed)
    assert corner.known
    assert corner.free_tokens == pytest.approx(FREE, rel=0.15)
    assert corner.decode_s == pytest.approx(OVERHEAD_S + READ_S, rel=0.03)
    assert corner.token_s == pytest.approx(TOKEN_S, rel=0.05)


def test_prefills_of_one_length_tell_nothing_of_overhead() -> None:
    corner = Corner()
    for _ in range(100):
        corner.observe(4, 4, step_s(4))
        corner.observe(2048, 5, step_s(2048))
    assert not corner.known
    assert corner.free_tokens == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_on_which_every_token_costs_has_none_for_nothing(seed: int) -> None:
    """Measured on a CPU: 4.9 ms a step and 0.17 ms a token, from the first on."""
    corner, rng = Corner(), random.Random(seed)
    for _ in range(1_000):
        calls = rng.randint(1, 8)
        new = calls + rng.choice((0, 0, 0, 12, 30, 100, 300, 700, 1400))
        corner.observe(new, calls, (0.0049 + 1.74e-4 * new) * rng.uniform(0.7, 1.3))
    assert corner.known
    assert corner.free_tokens == 0


def test_what_steps_in_between_take_is_noticed() -> None:
    """The long steps say that 121 tokens cost nothing; steps of 100 say otherwise, then do not."""
    corner = learned()
    for _ in range(30):
        corner.observe(100, 5, 1.6 * step_s(1))
    assert corner.free_tokens == 0
    for _ in range(60):
        corner.observe(100, 5, step_s(1))
    assert corner.free_tokens > 0


def test_nothing_is_known_of_a_machine_that_has_not_prefilled() -> None:
    corner = Corner()
    for _ in range(1_000):
        corner.observe(4, 4, step_s(4))
    assert not corner.known
    assert corner.free_tokens == 0
    assert prefill_tokens(corner, 4, 4, 1) is None


def test_pauses_of_the_process_do_not_move_it() -> None:
    corner, rng = Corner(), random.Random(2)
    for _ in range(2_000):
        calls = rng.randint(1, 12)
        new = calls if rng.random() < 0.6 else calls + rng.choice((700, 1400, 2036))
        pause = rng.uniform(0.1, 1.0) if rng.random() < 0.01 else 0.0
        corner.observe(new, calls, step_s(new) + pause)
    assert corner.free_tokens == pytest.approx(FREE, rel=0.35)


def test_it_follows_a_machine_that_changes() -> None:
    corner = learned(3_000)
    for _ in range(3_000):
        corner.observe(4, 4, 2.0 * step_s(4))
        corner.observe(1400, 5, step_s(1400))
        corner.observe(700, 5, step_s(700))
    assert corner.decode_s == pytest.approx(2.0 * (OVERHEAD_S + READ_S), rel=0.05)


def test_decodes_leave_the_rest_to_prefills() -> None:
    corner = learned()
    free = corner.free_tokens
    assert prefill_tokens(corner, 10, 10, 1) == free - 10
    assert prefill_tokens(corner, free + 100, free + 100, 1) == free // 4


def test_with_nobody_to_wait_for_it_a_prefill_goes_at_full_speed() -> None:
    corner = learned()
    assert prefill_tokens(corner, 0, 0, 3) is None
    assert prefill_tokens(corner, 5, 5, 0) is None


def test_many_who_wait_for_a_prefill_outweigh_few_who_decode() -> None:
    """Overhead over decode step is a sixth: so many times as many have to wait."""
    corner = learned()
    assert prefill_tokens(corner, 1, 1, 4) is not None
    assert prefill_tokens(corner, 1, 1, 20) is None


def test_the_cost_model_leaves_attention_out() -> None:
    """With contexts of 20,000 tokens attention is a third of a decode step, and not free."""
    cost, rng = CostModel(), random.Random(1)
    for _ in range(4_000):
        calls = rng.randint(1, 12)
        kv = calls * rng.randint(1_000, 40_000)
        new, pairs = calls, kv
        if rng.random() < 0.3:
            chunk, before = rng.choice((700, 1400, 2036)), rng.randint(0, 30_000)
            new, pairs, kv = new + chunk, pairs + chunk * before + chunk**2 // 2, kv + before
        took = step_s(new) + 2e-9 * pairs + 5e-8 * kv
        cost.observe(Step(new, pairs, kv, calls), took, took)
    assert cost.corner.free_tokens == pytest.approx(FREE, rel=0.2)


@given(
    st.lists(
        st.tuples(st.integers(1, 10_000), st.integers(1, 300), st.floats(1e-6, 1e4)), max_size=200
    ),
    st.integers(0, 3_000),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_whatever_was_seen_prefills_go_on(
    seen: list[tuple[int, int, float]], decode_tokens: int, decoding: int, prefilling: int
) -> None:
    corner = Corner()
    for new, calls, seconds in seen:
        corner.observe(new, calls, seconds)
    assert corner.free_tokens >= 0
    assert corner.overhead_s >= 0.0
    tokens = prefill_tokens(corner, decode_tokens, decoding, prefilling)
    assert tokens is None or tokens >= 1
