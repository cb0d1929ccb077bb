"""What a step takes, learned from steps: the tokens it computes for nothing, attention, pauses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.stepfit import Step, StepFit

OVERHEAD_S, READ_S, TOKEN_S = 0.0045, 0.023, 1.9e-4
PAIR_S, KV_S = 3.6e-9, 5.4e-8
FREE = READ_S / TOKEN_S  # 121 tokens
CHUNKS = (700, 1400, 2036)


def roofline(step: Step) -> float:
    """Reading the weights hides the arithmetic of the first `FREE` tokens; attention is extra."""
    attention_s = PAIR_S * step.pairs + KV_S * step.kv
    return OVERHEAD_S + max(READ_S, TOKEN_S * step.new) + attention_s


def linear(step: Step) -> float:
    """Measured on a CPU: 4.9 ms a step and 0.17 ms a token, from the first on."""
    return 0.0049 + 1.74e-4 * step.new + KV_S * step.kv


def steps(
    count: int, rng: random.Random, chunks: Iterable[int] = CHUNKS, share: float = 0.3
) -> Iterable[Step]:
    """Steps of 1 to 12 calls that decode; to a `share` of them a chunk of a prefill is added."""
    chunks = tuple(chunks)
    for _ in range(count):
        calls = rng.randint(1, 12)
        kv = calls * rng.randint(1_000, 40_000)
        if rng.random() >= share:
            yield Step(calls, kv, kv, calls)
            continue
        chunk, before = rng.choice(chunks), rng.randint(0, 60_000)
        pairs = kv + chunk * before + chunk * chunk // 2
        yield Step(calls + chunk, pairs, kv + before + chunk, calls + 1)


def learned(
    machine: Callable[[Step], float] = roofline,
    count: int = 3_000,
    noise: float = 0.05,
    seed: int = 1,
    **kinds: object,
) -> StepFit:
    cost, rng = CostModel(), random.Random(seed)
    for step in steps(count, rng, **kinds):
        took = machine(step) * rng.uniform(1 - noise, 1 + noise)
        cost.observe(step, took, took)
    return cost.fit


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_corner_is_found(seed: int, noise: float) -> None:
    fit = learned(seed=seed, noise=noise)
    assert fit.free_tokens == pytest.approx(FREE, rel=0.15)
    assert fit.decode_s == pytest.approx(OVERHEAD_S + READ_S, rel=0.03)
    assert fit.token_s == pytest.approx(TOKEN_S, rel=0.05)


def test_attention_is_told_from_the_rest() -> None:
    """With 12 contexts of 40,000 tokens it is half of a decode step."""
    fit = learned(chunks=(200, *CHUNKS))
    assert fit.pair_s == pytest.approx(PAIR_S, rel=0.1)
    assert fit.kv_s == pytest.approx(KV_S, rel=0.1)


def test_steps_that_are_paced_do_not_make_the_long_ones_forgotten() -> None:
    cost, rng = CostModel(), random.Random(1)
    for step in (*steps(1_000, rng), *steps(20_000, rng, chunks=(100, 110), share=0.5)):
        took = roofline(step) * rng.uniform(0.95, 1.05)
        cost.observe(step, took, took)
    assert cost.fit.free_tokens == pytest.approx(FREE, rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_on_which_every_token_costs_has_none_for_nothing(seed: int) -> None:
    chunks = (12, 30, 100, 300, 700, 1400)
    fit = learned(linear, noise=0.3, seed=seed, chunks=chunks, share=0.6)
    assert fit.free_tokens == 0
    assert fit.seconds(Step(1_000, 0, 0)) == pytest.approx(linear(Step(1_000, 0, 0)), rel=0.1)


def test_prefills_of_one_length_tell_nothing_of_a_corner() -> None:
    fit = StepFit()
    for _ in range(100):
        fit.observe(Step(4, 0, 0, 4), roofline(Step(4, 0, 0)))
        fit.observe(Step(2048, 0, 0, 5), roofline(Step(2048, 0, 0)))
    fit.solve()
    assert fit.free_tokens == 0


def test_nothing_is_known_of_a_machine_that_has_not_prefilled() -> None:
    assert learned(share=0.0).free_tokens == 0


def test_what_steps_in_between_take_is_noticed() -> None:
    """The long steps say that 121 tokens cost nothing; steps of 100 say otherwise, then do not."""
    cost = CostModel()
    for step in steps(2_000, random.Random(1)):
        cost.observe(step, roofline(step), 0.1)
    assert cost.fit.free_tokens
    between = Step(100, 0, 0, 5)
    for slower, many in ((1.6, 30), (1.0, 60)):
        for _ in range(many):
            cost.observe(between, slower * roofline(between), 0.1)
        assert (cost.fit.free_tokens == 0) == (slower > 1.0)


def test_pauses_of_the_process_do_not_move_it() -> None:
    cost, rng = CostModel(), random.Random(2)
    for step in steps(3_000, rng):
        pause = rng.uniform(0.1, 1.0) if rng.random() < 0.01 else 0.0
        cost.observe(step, roofline(step) + pause, 0.1)
    assert cost.fit.free_tokens == pytest.approx(FREE, rel=0.25)


def test_it_follows_a_machine_that_changes() -> None:
    cost = CostModel()
    for slower in (1.0, 2.0):
        for step in steps(8_000, random.Random(1)):
            cost.observe(step, slower * roofline(step), 0.1)
    assert cost.fit.decode_s == pytest.approx(2.0 * (OVERHEAD_S + READ_S), rel=0.05)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**6), st.integers(0, 10**12), st.integers(0, 10**7),
            st.floats(1e-6, 1e4), st.floats(0.001, 1.0),
        ),
        max_size=100,
    )
)  # fmt: skip
def test_nothing_it_sees_makes_it_absurd(seen) -> None:
    fit = StepFit()
    for new, pairs, kv, seconds, trust in seen:
        fit.observe(Step(new, pairs, kv), seconds, trust)
    fit.solve()
    assert min(fit.overhead_s, fit.token_s, fit.pair_s, fit.kv_s, fit.corner) >= 0.0
    assert 0 <= fit.free_tokens <= 4_096
    assert 0.0 <= fit.seconds(Step(1, 1, 1)) <= fit.seconds(Step(1_000, 1_000, 1_000)) < 1e9
