"""The trace reader: what it accepts, what it refuses and how it says so."""

import json
from pathlib import Path

import pytest

from vllm_saga.simulator import builtin, trace


def call(prompt: int = 100, new: int = 100, output: int = 10, **extra: object) -> dict[str, object]:
    return {"prompt_tokens": prompt, "new_tokens": new, "output_tokens": output, **extra}


def write(tmp_path: Path, *sessions: dict[str, object]) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(session) for session in sessions) + "\n")
    return path


def session(*calls: dict[str, object], **extra: object) -> dict[str, object]:
    return {"session_id": "s", "calls": list(calls), **extra}


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    line = session(call(colour="blue"), weather="fine", shared_prefix={"group": "g", "tokens": 5})
    [read] = trace.read(write(tmp_path, line))
    assert read.calls[0].prompt_tokens == 100
    assert read.shared_prefix == trace.SharedPrefix("g", 5)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (session(call(), call(new=101)), "calls[1].new_tokens: 101 exceeds prompt_tokens 100"),
        (session(call(prompt="many")), "calls[0].prompt_tokens: Expected `int`, got `str`"),
        (session(call(output=0)), "calls[0].output_tokens: Expected `int` >= 1"),
        (session(call(), call(parent=1)), "calls[1].parent: 1 is not an earlier call"),
        (session(call(deps=[0])), "calls[0].deps: 0 is not an earlier call"),
        (session(call(tool_latency_s=-1)), "calls[0].tool_latency_s: Expected `float` >= 0"),
        (session(call(kind="twig")), "calls[0].kind: Invalid enum value 'twig'"),
        (session(), "calls: Expected `array` of length >= 1"),
        ({"calls": [call()]}, "Object missing required field `session_id`"),
    ],
)
def test_errors_name_file_line_and_field(
    tmp_path: Path, line: dict[str, object], complaint: str
) -> None:
    path = write(tmp_path, {**session(call()), "session_id": "fine"}, line)
    with pytest.raises(trace.TraceError) as error:
        trace.read(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert complaint in str(error.value)


def test_a_line_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"session_id": ')
    with pytest.raises(trace.TraceError, match=r"trace.jsonl:1: not a JSON object"):
        trace.read(path)


def test_duplicate_empty_and_missing(tmp_path: Path) -> None:
    with pytest.raises(trace.TraceError, match=r":2: session_id 's' was already used on line 1"):
        trace.read(write(tmp_path, session(call()), session(call())))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(trace.TraceError, match="holds no session"):
        trace.read(tmp_path / "empty")
    with pytest.raises(trace.TraceError, match="cannot read the trace"):
        trace.read(tmp_path / "absent")


def test_sub_agent_links_and_delays(tmp_path: Path) -> None:
    """A main thread (calls 0, 3) that waits for a sub-agent (calls 1, 2)."""
    line = session(
        call(1000, 1000, 10, gap="subagents", tool_latency_s=60, llm_s=1),
        call(200, 200, 10, agent="a", deps=[0], delay_s=0.5, llm_s=2, gap="tool", tool_latency_s=3),
        call(260, 50, 10, agent="a", llm_s=2, gap="end"),
        call(1100, 90, 10, deps=[0, 2], llm_s=1, gap="end"),
    )
    [read] = trace.read(write(tmp_path, line))
    assert read.parents == (None, 0, 1, 0)
    assert read.deps == ((), (0,), (1,), (0, 2))
    assert read.delays_s == (0.0, 0.5, 3.0, 0.0)
    assert read.timeline == ((0, 1), (1.5, 3.5), (6.5, 8.5), (8.5, 9.5))
    # The main context is kept while the sub-agent runs; the sub-agent's dies with its last call.
    expected = 1010 * 8.5 + 210 * 5 + 270 * 2 + 1110 * 1
    assert read.context_token_seconds == pytest.approx(expected)


def test_unknown_gaps_are_filled_the_same_way_every_time(tmp_path: Path) -> None:
    line = session(call(gap="tool"), call(gap="human"), call(gap="subagents"), call(gap="end"))
    first, second = (trace.read(write(tmp_path, line))[0] for _ in range(2))
    assert first.delays_s == second.delays_s
    assert 0.01 <= first.delays_s[1] <= 600
    assert 0 < first.delays_s[2] <= trace.HUMAN_GAP_CAP_S
    assert first.delays_s[3] == 0.0
    assert trace.fill_gap_s("s", 0, "tool") != trace.fill_gap_s("t", 0, "tool")


def test_filled_tool_gaps_follow_the_published_shares() -> None:
    gaps = [trace.fill_gap_s("s", k, "tool") for k in range(4000)]
    for limit, share in ((1, 0.61), (10, 0.88), (60, 0.96)):
        assert sum(gap <= limit for gap in gaps) / len(gaps) == pytest.approx(share, abs=0.03)


def test_model_seconds_recorded_or_estimated() -> None:
    assert trace.Call(10, 10, 5, llm_s=3.0).model_s == 3.0
    assert trace.Call(1000, 1000, 10).model_s == pytest.approx(0.46 + 0.029)


def test_builtin_sessions_are_seeded_and_valid() -> None:
    sessions = builtin.sessions(60, seed=1)
    assert sessions[:5] == builtin.sessions(5, seed=1)
    assert sessions[:5] != builtin.sessions(5, seed=2)
    for one in sessions:
        trace.check(one, one.session_id)
        assert one.calls[-1].gap == "end"
        for before, after in zip(one.calls, one.calls[1:], strict=False):
            assert after.reusable_tokens == before.context_tokens
    calls = [len(one.calls) for one in sessions]
    assert sum(calls) / len(calls) == pytest.approx(builtin.MEAN_CALLS, rel=0.25)
