"""Token ids: prefixes repeat exactly as far as the trace says, and no further."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.live.scale import ScaledCall, ScaledSession
from benchmarks.live.tokens import FIRST_ID, TokenSource

VOCABULARY = 512
BLOCK = 32


def shared(left: list[int], right: list[int]) -> int:
    """Length of the common prefix, in tokens."""
    for k, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return k
    return min(len(left), len(right))


@st.composite
def scaled_sessions(draw: st.DrawFn) -> ScaledSession:
    calls = [ScaledCall(draw(st.integers(2, 300)), 0, draw(st.integers(1, 20)), None, (), 0.0, 1.0)]
    for k in range(draw(st.integers(0, 8))):
        parent = draw(st.integers(0, k))
        whole = calls[parent].context_tokens
        reusable = draw(st.one_of(st.just(whole), st.integers(0, whole)))
        prompt = reusable + draw(st.integers(1, 200))
        calls.append(ScaledCall(prompt, reusable, draw(st.integers(1, 20)), parent, (k,), 0.0, 1.0))
    prefix = draw(st.integers(0, calls[0].prompt_tokens - 1))
    return ScaledSession(draw(st.uuids()).hex, tuple(calls), "group", prefix, 1.0, 1.0)


def prompts(session: ScaledSession, namespace: str = "test") -> list[list[int]]:
    """All prompts of a session whose server answers with the id 7 only."""
    source = TokenSource(session, VOCABULARY, namespace)
    out = []
    for index, call in enumerate(session.calls):
        out.append(source.prompt(index))
        source.complete(index, out[-1], [7] * call.output_tokens)
    return out


@given(scaled_sessions())
def test_a_call_shares_exactly_its_reusable_tokens_with_its_parent(session: ScaledSession) -> None:
    built = prompts(session)
    for call, prompt in zip(session.calls, built, strict=True):
        assert len(prompt) == call.prompt_tokens
        assert all(FIRST_ID <= token < VOCABULARY or token == 7 for token in prompt)
        if call.parent is not None:
            before = session.calls[call.parent]
            context = built[call.parent] + [7] * before.output_tokens
            assert shared(prompt, context) == call.reusable_tokens


@given(scaled_sessions(), scaled_sessions())
def test_sessions_of_a_group_share_the_prefix_and_no_block_more(
    one: ScaledSession, two: ScaledSession
) -> None:
    left, right = prompts(one)[0], prompts(two)[0]
    common = min(one.prefix_tokens, two.prefix_tokens)
    assert left[:common] == right[:common]
    if one.session_id != two.session_id:
        blocks = min(len(left), len(right)) // BLOCK
        for k in range(blocks):
            if (k + 1) * BLOCK > common + BLOCK:
                assert left[k * BLOCK : (k + 1) * BLOCK] != right[k * BLOCK : (k + 1) * BLOCK]


@given(scaled_sessions())
def test_prompts_are_the_same_for_every_arm_and_differ_between_namespaces(
    session: ScaledSession,
) -> None:
    assert prompts(session) == prompts(session)
    if session.calls[0].prompt_tokens > BLOCK:
        assert prompts(session)[0][:BLOCK] != prompts(session, "other")[0][:BLOCK]
