"""Scaling: reuse stays exact, nothing drifts, the pool follows the definition of overcommit."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.live import scale
from benchmarks.live.run import Settings, make_plan
from vllm_saga.simulator import builtin
from vllm_saga.simulator.trace import Call, Session


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    """Sessions of appends, context edits, replies without thinking, and roots."""
    calls = [Call(first := draw(st.integers(1, 9_000)), first, draw(st.integers(1, 900)))]
    for _ in range(draw(st.integers(0, 12))):
        last = calls[-1]
        reusable = draw(
            st.sampled_from([last.context_tokens, last.prompt_tokens, last.prompt_tokens // 2, 0])
        )
        new = draw(st.integers(0, 4_000)) + (reusable == 0)
        kind = None if reusable >= last.prompt_tokens else "branch"
        calls.append(Call(reusable + new, new, draw(st.integers(1, 900)), kind=kind))
    return Session(draw(st.uuids()).hex, tuple(calls))


@given(sessions(), st.floats(0.005, 1.0))
def test_scaled_calls_are_consistent(session: Session, factor: float) -> None:
    scaled = scale.scale_session("s", session, factor, gap_cap_s=600)
    for call, recorded, parent in zip(scaled.calls, session.calls, session.parents, strict=True):
        assert call.output_tokens >= 1
        assert call.reusable_tokens < call.prompt_tokens
        if parent is not None:
            before = scaled.calls[parent]
            assert call.reusable_tokens <= before.context_tokens
            if recorded.reusable_tokens == session.calls[parent].context_tokens:
                assert call.reusable_tokens == before.context_tokens
        # Rounding does not accumulate; only outputs that may not vanish can push a prompt up.
        slack = 2 + sum(c.output_tokens * factor < 1 for c in session.calls) + len(session.calls)
        assert abs(call.prompt_tokens - recorded.prompt_tokens * factor) <= slack


def test_gaps_are_capped() -> None:
    session = Session("s", (Call(10, 10, 1, tool_latency_s=1e6), Call(20, 9, 1)))
    assert scale.scale_session("s", session, 1.0, gap_cap_s=600).calls[1].delay_s == 600


def test_token_scale_gives_the_mean_prompt() -> None:
    load = builtin.sessions(20)
    factor = scale.token_scale(load, 1000)
    calls = [c for s in load for c in scale.scale_session("s", s, factor, 600).calls]
    assert sum(c.prompt_tokens for c in calls) / len(calls) == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("overcommit", [0.5, 1.0, 2.0])
def test_pool_follows_overcommit(overcommit: float) -> None:
    load = [scale.scale_session(s.session_id, s, 0.05, 600) for s in builtin.sessions(20)]
    pool = scale.pool(load, lanes=12, overcommit=overcommit, block_size=32)
    assert pool.overcommit == pytest.approx(overcommit, rel=0.02)
    assert pool.tokens * pool.overcommit == pytest.approx(12 * scale.mean_context_tokens(load))


def test_pool_holds_the_largest_request() -> None:
    load = [scale.scale_session(s.session_id, s, 0.05, 600) for s in builtin.sessions(20)]
    pool = scale.pool(load, lanes=2, overcommit=50, block_size=32)
    assert pool.tokens >= 1.1 * max(session.max_context_tokens for session in load)
    assert pool.overcommit < 50
    assert scale.pool(load, 2, 50, 32, largest_tokens=10_000).tokens >= 11_000


@pytest.mark.parametrize("overcommit", [0.5, 2.0, 50.0])
def test_every_request_of_a_plan_fits_the_model_length_and_the_pool(overcommit: float) -> None:
    settings = Settings(
        ("stock",), 5, 4, overcommit, 500.0, seed=0, model=Path("model"), vocabulary=512
    )
    plan = make_plan(builtin.sessions(10), settings)
    largest = max(one.max_context_tokens for one in [*plan.sessions, *plan.calibration])
    assert largest < plan.max_model_len <= plan.pool.tokens
    assert {len(one.calls) for one in plan.calibration} <= set(range(1, 41))


def test_mean_context_weighs_sessions_by_their_time() -> None:
    def constant(tokens: int, seconds: float) -> scale.ScaledSession:
        call = Call(tokens - 1, tokens - 1, 1, llm_s=seconds)
        return scale.scale_session("s", Session("s", (call,)), 1.0, 600)

    load = [constant(100, 1.0), constant(1000, 9.0)]
    assert scale.mean_context_tokens(load) == pytest.approx(910)


def test_pick_is_seeded_and_repeats_under_new_names() -> None:
    load = builtin.sessions(6)
    names = [name for name, _ in scale.pick(load, 9, seed=3)]
    assert names == [name for name, _ in scale.pick(load[::-1], 9, seed=3)]
    assert len(set(names)) == 9
    assert names[6] == f"{names[0]}#2"
    assert names != [name for name, _ in scale.pick(load, 9, seed=4)]
