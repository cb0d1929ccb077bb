"""Trace files of every format."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.simulator import formats, trace
from vllm_saga.simulator.formats import blocks
from vllm_saga.simulator.trace import Session, SharedPrefix


def lines(path: Path, *objects: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(thing) for thing in objects) + "\n")
    return path


def loaded(path: Path, **options: Any) -> list[Session]:
    sessions = formats.load(path, **options)
    for one in sessions:
        trace.check(one, one.session_id)
        ended: list[set[int]] = []
        for deps, parent in zip(one.deps, one.parents, strict=True):
            ended.append({*deps, *(call for dep in deps for call in ended[dep])})
            assert parent is None or parent in ended[-1], "extends a call that may still run"
    return sessions


# -- which format ------------------------------------------------------------------------------


def test_built_in_workloads() -> None:
    assert formats.BUILTIN == ("swe", "web", "claude-code", "service", "tenants")
    assert formats.load("builtin:web", 3, 5) == formats.load("builtin:web", 9, 5)[:3]
    assert len(formats.load("builtin:web")) == formats.DEFAULT_COUNT
    with pytest.raises(trace.TraceError, match="'wep' is not a built-in workload"):
        formats.load("builtin:wep")


def test_our_own_format(tmp_path: Path) -> None:
    call = {"prompt_tokens": 9, "new_tokens": 9, "output_tokens": 1}
    path = lines(tmp_path / "any.name", {"session_id": "a", "calls": [call]})
    assert loaded(path) == trace.read(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no session"),
        ("speak, friend", "neither JSON nor JSON lines; known formats are vllm-saga v1"),
        ('{"arrival_s": 3}', "not a trace format we know; known are vllm-saga v1"),
        ("[1, 2]", "not a trace format we know"),
        ('{"messages": [], "timestamp": 0}', "rows with 'messages' carry text"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(trace.TraceError, match=complaint) as error:
        formats.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(trace.TraceError, match=r"cannot read the trace: .*builtin:swe"):
        formats.load(tmp_path / "absent")
    with pytest.raises(trace.TraceError, match=r"holds no \.json file"):
        formats.load(tmp_path)


# -- mooncake_trace ----------------------------------------------------------------------------


def row(tokens: int, ids: list[int] | None = None, **extra: Any) -> dict[str, Any]:
    hashes = {} if ids is None else {"hash_ids": ids}
    return {"input_length": tokens, "output_length": 50, **hashes, **extra}


def test_turns_of_a_session_accumulate(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl",
        row(150, [1, 2, 9], session_id="a", timestamp=2_000),
        row(20, session_id="a", delay=750),
        row(140, [1, 2, 8], session_id="b", timestamp=3_000),
        row(5, session_id="a"),
    )
    a, b = loaded(path)
    assert [(c.prompt_tokens, c.new_tokens) for c in a.calls] == [(150, 150), (220, 20), (275, 5)]
    assert [c.tool_latency_s for c in a.calls] == [0.75, 0.0, None]
    assert [c.gap for c in a.calls] == ["tool", "tool", "end"]
    assert (a.arrival_s, b.arrival_s) == (2.0, 3.0)
    assert a.shared_prefix == b.shared_prefix
    assert a.shared_prefix is not None and a.shared_prefix.tokens == 128


def test_turns_with_timestamps_leave_out_the_model(tmp_path: Path) -> None:
    rows = [row(9, session_id="a", timestamp=t) for t in (0, 10_000, 10_500)]
    [session] = loaded(lines(tmp_path / "t.jsonl", *rows))
    first = session.calls[0]
    assert first.tool_latency_s == pytest.approx(10 - first.model_s)
    assert session.calls[1].tool_latency_s == 0.0


def test_single_rows_that_continue_each_other_are_a_conversation(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl",
        row(1_100, [1, 2, 3], timestamp=0),
        row(1_600, [1, 2, 4, 5], timestamp=60_000),
        row(1_000, [7, 8], timestamp=61_000),
        row(1_700, [1, 2, 4, 9], timestamp=70_000),
        row(1_700, [1, 2, 4, 6], timestamp=80_000),
        row(1_600, [1, 2, 5, 6], timestamp=90_000),
    )
    first, other, fork = loaded(path)
    # Full blocks: [1, 2], [1, 2, 4], [7], [1, 2, 4], [1, 2, 4]; [1, 2, 5] is too late for [1, 2].
    assert [c.prompt_tokens for c in first.calls] == [1_100, 1_600, 1_700, 1_700]
    assert [c.reusable_tokens for c in first.calls] == [0, 1_024, 1_536, 1_536]
    assert [c.kind for c in first.calls] == [None, "branch", "branch", "branch"]
    assert [c.gap for c in first.calls] == ["human", "human", "human", "end"]
    assert first.delays_s[1] == pytest.approx(60 - first.calls[0].model_s)
    assert [one.session_id for one in (first, other, fork)] == ["t:1", "t:3", "t:6"]
    assert fork.calls[0].kind is None
    assert first.shared_prefix == fork.shared_prefix == SharedPrefix("prefix-2", 1_024)
    assert other.shared_prefix is None


def test_a_common_system_prompt_links_nobody(tmp_path: Path) -> None:
    rows = [row(513, [0, 100 + k], timestamp=k) for k in range(50)]
    sessions = loaded(lines(tmp_path / "t.jsonl", *rows))
    assert [len(one.calls) for one in sessions] == [1] * 50
    assert {one.shared_prefix for one in sessions} == {SharedPrefix("prefix-1", 512)}


@pytest.mark.parametrize("size", [16, 64, 512])
def test_block_size_is_inferred(tmp_path: Path, size: int) -> None:
    rows = [row(3 * size + 5, [1, 2, 3 + k, 90 + k], session_id=str(k)) for k in range(4)]
    rows += [row(7 * size + 1, [1, 2, *range(20, 26)], session_id="x")]
    path = lines(tmp_path / "t.jsonl", *rows)
    assert loaded(path)[0].shared_prefix == SharedPrefix("prefix-2", 2 * size)
    [session, *_] = loaded(path, block_size=8)
    assert session.shared_prefix is not None and session.shared_prefix.tokens == 16


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (row(0), "t.jsonl:2: input_length: Expected `int` >= 1"),
        ({"input_length": 5}, "t.jsonl:2: Object missing required field `output_length`"),
        (row(5, delay=-1), "t.jsonl:2: delay: Expected `float` >= 0"),
        (row(5, ["a"]), r"t.jsonl:2: hash_ids\[0\]: Expected `int`, got `str`"),  # type: ignore[list-item]
    ],
)
def test_mooncake_errors_name_line_and_field(
    tmp_path: Path, line: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(trace.TraceError, match=complaint):
        formats.load(lines(tmp_path / "t.jsonl", row(5), line))


def test_unexplained_hash_ids_ask_for_the_block_size(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", row(5_000, [1, 2, 3]))
    with pytest.raises(trace.TraceError, match=r"hash_ids: no block size .* give block_size"):
        formats.load(path)
    assert len(loaded(path, block_size=2_000)) == 1


# -- kv-cache-tester ---------------------------------------------------------------------------

BLOCK = 64


def request(t: float, prompt: int, ids: list[int], **extra: Any) -> dict[str, Any]:
    return {
        "t": t, "type": "s", "model": "m", "in": prompt, "out": 10, "hash_ids": ids,
        "input_types": ["tool_result"], "output_types": ["text"], "api_time": 2.0, **extra,
    }  # fmt: skip


def subagent(t: float, *requests: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {
        "t": t, "type": "subagent", "agent_id": "agent_001", "subagent_type": "Explore",
        "duration_ms": 20_000, "status": "completed", "requests": list(requests), **extra,
    }  # fmt: skip


def recorded(*requests: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"id": "trace_1", "block_size": BLOCK, "requests": list(requests), **extra}


def one_session(tmp_path: Path, *requests: dict[str, Any], **extra: Any) -> Session:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(recorded(*requests, **extra), indent=1))
    [session] = loaded(path)
    return session


def test_appends_edits_and_fresh_starts(tmp_path: Path) -> None:
    session = one_session(
        tmp_path,
        request(0, 200, [1, 2, 3]),
        request(5, 300, [1, 2, 3, 4]),  # extends 200 + 10
        request(9, 305, [1, 2, 3, 4]),  # the answer was dropped from the history
        request(20, 400, [1, 2, 8, 9, 10, 11], think_time=6.5),  # an edit after block 2
        request(30, 320, [1, 2, 3, 4, 5]),  # back to what the third call left, 305 + 10
        request(40, 100, [50]),  # nothing known
        tool_tokens=100,
        system_tokens=60,
    )
    assert [c.reusable_tokens for c in session.calls] == [0, 210, 300, 128, 315, 0]
    assert [c.kind for c in session.calls] == [None, None, "branch", "branch", None, "root"]
    assert session.parents == (None, 0, 1, 2, 2, 4)
    assert session.shared_prefix == SharedPrefix("tools100", 160)
    assert [c.tool_latency_s for c in session.calls] == [3.0, 2.0, 6.5, 8.0, 8.0, None]
    assert session.calls[0].llm_s == 2.0
    assert (session.tenant, session.model) == ("cc-100-60", "m")


def test_gaps_and_aborted_requests(tmp_path: Path) -> None:
    session = one_session(
        tmp_path,
        request(0, 200, [1, 2, 3], stop="end_turn"),
        request(9, 300, [1, 2, 3, 4], input_types=[]),
        request(20, 400, [1, 2, 3, 4], input_types=["text"], api_time=None, output_types=[]),
    )
    assert [c.gap for c in session.calls] == ["human", "human", "end"]
    assert [c.aborted for c in session.calls] == [False, False, True]


def test_another_model_reuses_nothing(tmp_path: Path) -> None:
    session = one_session(
        tmp_path,
        request(0, 200, [1, 2, 3]),
        request(5, 190, [1, 2], model="small"),
        request(9, 300, [1, 2, 3, 4]),
    )
    assert [c.reusable_tokens for c in session.calls] == [0, 0, 210]
    assert session.parents == (None, 0, 0)


@pytest.mark.parametrize("start_s", [0.0, 10.0])
def test_sub_agents_run_side_by_side_and_are_waited_for(tmp_path: Path, start_s: float) -> None:
    """Their times are relative to their start (10 s), or those of the session."""
    inner = [request(start_s, 130, [70, 71]), request(start_s + 5, 260, [70, 71, 72, 73])]
    session = one_session(
        tmp_path,
        request(0, 640, list(range(1, 11)), api_time=8.0),
        subagent(30, *inner),
        subagent(30, *inner, agent_id="agent_002"),
        request(33, 700, list(range(1, 11))),
    )
    spawn, a, a2, b, b2, join = session.calls
    assert (spawn.gap, spawn.tool_latency_s) == ("subagents", None)
    assert [c.agent for c in session.calls] == [None, *["agent_001"] * 2, *["agent_002"] * 2, None]
    assert (a.subagent_type, a2.subagent_type) == ("Explore", None)
    assert session.deps == ((), (0,), (1,), (0,), (3,), (0, 2, 4))
    assert (a.delay_s, b.delay_s, join.delay_s) == (2.0, 2.0, 3.0)
    assert (a.kind, a.reusable_tokens, b.reusable_tokens) == ("root", 0, 0)
    assert (a2.reusable_tokens, b2.reusable_tokens) == (140, 140)
    # A sub-agent may not build on one that runs beside it, equal as their prompts are.
    assert session.parents == (None, 0, 1, 0, 3, 0)
    assert (a.tool_latency_s, a2.gap, join.gap) == (3.0, "end", "end")


def test_sub_agents_nobody_waits_for_and_nested_ones(tmp_path: Path) -> None:
    nested = subagent(4, request(0, 130, [90, 91]), duration_ms=1_000)
    session = one_session(
        tmp_path,
        request(0, 200, [1, 2, 3]),
        subagent(3, request(1, 130, [70, 71]), nested, status="async_launched", duration_ms=None),
        request(6, 300, [1, 2, 3, 4]),
        subagent(20, request(0, 130, [80, 81])),
    )
    agents = ["agent_001", "agent_001/agent_001", None, "agent_001#2"]
    assert [c.agent for c in session.calls[1:]] == agents
    assert session.deps == ((), (0,), (1,), (0,), (3,))
    assert session.delays_s[3] == session.calls[0].tool_latency_s == 4.0


def test_a_session_may_begin_with_a_sub_agent(tmp_path: Path) -> None:
    session = one_session(
        tmp_path, subagent(30, request(0, 130, [70, 71])), request(33, 700, list(range(1, 11)))
    )
    assert session.deps == ((), (0,))
    assert session.calls[1].delay_s == 3.0


def test_requests_without_hashes_extend_the_one_before_if_they_can(tmp_path: Path) -> None:
    session = one_session(tmp_path, request(0, 200, []), request(5, 300, []), request(9, 250, []))
    assert [c.reusable_tokens for c in session.calls] == [0, 210, 0]


def test_directories_lines_and_global_hashes(tmp_path: Path) -> None:
    traces = [
        recorded(request(0, 200, [1, 2, 10 + k]), hash_id_scope="global") | {"id": f"trace_{k}"}
        for k in range(3)
    ]
    for k, one in enumerate(traces):
        (tmp_path / f"{k}.json").write_text(json.dumps(one))
    (tmp_path / "notes.txt").write_text("not a trace")
    sessions = loaded(tmp_path)
    assert [one.session_id for one in sessions] == ["trace_0", "trace_1", "trace_2"]
    assert {one.shared_prefix for one in sessions} == {SharedPrefix("prefix-2", 128)}
    assert loaded(lines(tmp_path / "all.jsonl", *traces)) == sessions
    (tmp_path / "3.json").write_text(json.dumps(traces[0]))
    with pytest.raises(
        trace.TraceError, match=r"3.json: id 'trace_0' was already used in .*0.json"
    ):
        formats.load(tmp_path)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({"t": 0, "type": "s", "out": 3}, r"requests\[0\].in: must be at least 1"),
        ({"t": 0, "type": "z", "in": 3}, r"requests\[0\].type: Invalid enum value 'z'"),
        (request(0, 3, ["a"]), r"requests\[0\].hash_ids\[0\]: Expected `int`"),  # type: ignore[list-item]
        (subagent(0), "holds no request of an agent"),
        (subagent(0, {"t": 0, "type": "n"}), r"requests\[0\].requests\[0\].in: must be"),
    ],
)
def test_kv_cache_tester_errors_name_the_field(
    tmp_path: Path, broken: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(trace.TraceError, match=complaint) as error:
        one_session(tmp_path, broken)
    assert str(error.value).startswith(str(tmp_path / "trace.json"))


# -- what hashes say ---------------------------------------------------------------------------

ids = st.lists(st.integers(0, 2), max_size=6)


@given(ids, ids)
def test_common_counts_from_the_front(a: list[int], b: list[int]) -> None:
    slow = next((k for k in range(min(len(a), len(b))) if a[k] != b[k]), min(len(a), len(b)))
    assert blocks.common(a, b) == slow


@given(st.lists(ids, max_size=12))
def test_what_shared_prefixes_claim_is_shared(prompts: list[list[int]]) -> None:
    found = blocks.shared_prefixes([(one, 10 * len(one)) for one in prompts], 10)
    for a, one in zip(prompts, found, strict=True):
        assert one is None or one.tokens
        for b, other in zip(prompts, found, strict=True):
            if one is not None and other is not None and one.group == other.group:
                assert one.tokens == other.tokens
                assert blocks.common(a, b) * 10 >= (one.tokens or 0)
    repeated = [one for one in prompts if one and prompts.count(one) > 1]
    if repeated:
        assert any(found)
