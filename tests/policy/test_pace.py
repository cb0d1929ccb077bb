"""Prefill beside decodes: no more than a step computes for nothing, where somebody waits for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from test_stepfit import learned

from vllm_saga.policy.pace import prefill_tokens
from vllm_saga.policy.stepfit import Step, StepFit

FIT = learned()


def test_decodes_leave_the_rest_to_prefills() -> None:
    free = FIT.free_tokens
    assert prefill_tokens(FIT, 10, 10, 1) == free - 10
    assert prefill_tokens(FIT, free + 100, free + 100, 1) == free // 4


def test_with_nobody_to_wait_for_it_a_prefill_goes_at_full_speed() -> None:
    assert prefill_tokens(FIT, 0, 0, 3) is None
    assert prefill_tokens(FIT, 5, 5, 0) is None


def test_many_who_wait_for_a_prefill_outweigh_few_who_decode() -> None:
    """At its pace a prefill takes a fifth longer: so many times as many have to wait."""
    assert prefill_tokens(FIT, 1, 1, 2) is not None
    assert prefill_tokens(FIT, 1, 1, 20) is None
    assert prefill_tokens(FIT, 4, 4, 40) is None
    assert prefill_tokens(FIT, 20, 20, 20) is not None


def test_without_tokens_for_nothing_prefills_go_at_full_speed() -> None:
    assert prefill_tokens(StepFit(), 4, 4, 1) is None


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10_000), st.integers(0, 10**9), st.integers(0, 10**6),
            st.floats(1e-6, 1e4),
        ),
        max_size=60,
    ),
    st.integers(0, 3_000),
    st.integers(0, 300),
    st.integers(0, 300),
)  # fmt: skip
def test_whatever_was_seen_prefills_go_on(
    seen: list[tuple[int, int, int, float]], decode_tokens: int, decoding: int, prefilling: int
) -> None:
    other = StepFit()
    for new, pairs, kv, seconds in seen:
        other.observe(Step(new, pairs, kv), seconds)
    other.solve()
    for fit in (FIT, other):
        tokens = prefill_tokens(fit, decode_tokens, decoding, prefilling)
        assert tokens is None or tokens >= 1
