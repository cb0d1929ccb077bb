"""Which conversation a request belongs to, by its messages alone."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.policy.messages import (
    MessageLineage,
    estimate_tokens,
    read_response_id,
    shared_prefix,
)

SYSTEM = {"role": "system", "content": "You are an agent. " * 50}


def lineage(max_sessions: int = 100, idle_s: float = 1000.0) -> MessageLineage:
    return MessageLineage(max_sessions, idle_s)


def said(role: str, text: object) -> dict[str, object]:
    return {"role": role, "content": text}


def chat(*texts: str) -> dict[str, object]:
    """User and assistant in turns, behind one system prompt."""
    turns = [said("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    return {"model": "m", "messages": [SYSTEM, *turns]}


def anthropic(*texts: str) -> dict[str, object]:
    body = chat(*texts)
    return {"model": "m", "system": SYSTEM["content"], "messages": body["messages"][1:]}


def responses(*texts: str) -> dict[str, object]:
    items: list[dict[str, object]] = []
    for index, text in enumerate(texts):
        if index % 2:
            items.append({"type": "reasoning", "id": f"rs_{index}", "summary": []})
            call = {"type": "function_call", "name": "run", "arguments": text, "call_id": text}
            items.append(call)
        elif index:
            items.append({"type": "function_call_output", "call_id": texts[index - 1], "x": text})
        else:
            items.append({"type": "message", **said("user", text)})
    return {"model": "m", "instructions": SYSTEM["content"], "input": items}


def plain(*texts: str) -> dict[str, object]:
    return {"model": "m", "prompt": str(SYSTEM["content"]) + "\n".join(texts)}


def tokens(*texts: str) -> dict[str, object]:
    return {"model": "m", "prompt": list(plain(*texts)["prompt"].encode())}


MAKERS = [chat, anthropic, responses, plain, tokens]


@pytest.mark.parametrize("make", MAKERS)
def test_a_conversation_keeps_its_id_and_others_have_theirs(make):
    found = lineage()
    ids = {}
    for turns in (1, 3, 5):
        for name in ("fix the bug", "write a test", "fix the bug, please"):
            texts = [f"{name} {turn}" for turn in range(turns)]
            ids.setdefault(name, set()).add(found.recognise("t", make(*texts), turns))
    assert all(len(of) == 1 for of in ids.values())
    assert len(set.union(*ids.values())) == 3 and len(found) == 3


@pytest.mark.parametrize("make", [chat, anthropic, responses])
def test_another_router_gives_the_same_id_at_any_turn(make):
    first, second = lineage(), lineage()
    body = make("task", "answer", "result")
    assert first.recognise("t", make("task"), 0.0) == second.recognise("t", body, 0.0)


@pytest.mark.parametrize("make", MAKERS)
def test_tenants_and_models_do_not_mix(make):
    found = lineage()
    body = make("task", "answer")
    ids = {found.recognise(tenant, body, 0.0) for tenant in ("a", "b")}
    ids.add(found.recognise("a", {**body, "model": "other"}, 0.0))
    assert len(ids) == 3


@pytest.mark.parametrize("make", [chat, anthropic, responses])
def test_one_task_run_many_times_is_many_sessions_that_keep_apart(make):
    found = lineage()
    begun = [found.recognise("t", make("task"), 0.0) for _ in range(5)]
    assert len(set(begun)) == 5
    history = {run: ["task"] for run in range(5)}
    went_on: dict[int, set[str | None]] = {run: set() for run in range(5)}
    for turn in range(3):
        for run in range(5):
            history[run] += [f"answer {run} {turn}", "go on"]
            went_on[run].add(found.recognise("t", make(*history[run]), 1.0 + turn))
    assert all(len(ids) == 1 for ids in went_on.values())
    assert set.union(*went_on.values()) == set(begun)


def test_what_a_client_rewrites_each_time_does_not_matter():
    """As Claude Code does: cache marks wander, the billing line changes, thoughts are dropped."""

    def body(turn: int, *messages: dict[str, object]) -> dict[str, object]:
        billing = {"type": "text", "text": f"x-anthropic-billing-header: cch={turn};"}
        system = [billing, {"type": "text", "text": "You are.", "cache_control": {"type": "e"}}]
        marked = copy.deepcopy(list(messages))
        text = {"type": "text", "text": marked[-1]["content"], "cache_control": {"type": "e"}}
        marked[-1]["content"] = [text]
        return {"model": "m", "system": system, "messages": marked}

    task = said("user", "task")
    call = {"type": "tool_use", "id": "1", "name": "Bash", "input": {"command": "ls"}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    thoughtful = said("assistant", [thought, call])
    found = lineage()
    first = found.recognise("t", body(1, task), 0.0)
    second = found.recognise("t", body(2, task, thoughtful, said("user", "result")), 1.0)
    short = said("assistant", [call])
    third = found.recognise(
        "t",
        body(3, task, short, said("user", "result"), said("assistant", "ok"), said("user", "more")),
        2.0,
    )
    assert first == second == third


def test_a_rewritten_last_turn_is_the_same_conversation():
    found = lineage()
    first = found.recognise("t", chat("task", "answer", "result + reminder"), 0.0)
    assert found.recognise("t", chat("task", "answer", "result", "b", "c"), 1.0) == first


def test_a_retry_is_the_same_session_and_goes_on_as_one():
    found = lineage()
    found.recognise("t", chat("task"), 0.0)
    again = found.recognise("t", chat("task"), 1.0)
    second = chat("task", "answer", "result")
    assert found.recognise("t", second, 2.0) == found.recognise("t", second, 3.0) == again


def test_examples_in_common_link_nothing():
    found = lineage()
    examples = ["example", "its answer"]
    ids = {found.recognise("t", chat(*examples, f"task {n}"), 0.0) for n in range(10)}
    assert len(ids) == 10


def test_short_plain_prompts_are_not_continued_by_chance():
    found = lineage()
    first = found.recognise("t", {"prompt": "The"}, 0.0)
    assert found.recognise("t", {"prompt": "The weather"}, 1.0) != first


def test_a_response_s_id_leads_to_its_session():
    found = lineage()
    event = b'event: response.created\ndata: {"response":{"id":"resp_ab-1","object":"response"'
    response = read_response_id(event)
    assert response == "resp_ab-1" and read_response_id(b"data: {}") is None
    found.note_response("t", response, "theirs", 0.0)
    body = {"input": "go on", "previous_response_id": response}
    assert found.recognise("t", body, 1.0) == "theirs"
    assert found.recognise("other", body, 1.0) != "theirs"
    assert found.recognise("t", {**body, "previous_response_id": "resp_x"}, 1.0) != "theirs"


def test_the_idle_and_the_oldest_are_forgotten():
    found = lineage(max_sessions=10, idle_s=60.0)
    for number in range(100):
        found.recognise("t", chat(f"task {number}"), 0.0)
        found.note_response("t", f"resp_{number}", "s", 0.0)
    assert len(found) == len(found._responses) <= 11
    found.recognise("t", chat("late"), 61.0)
    assert len(found) == len(found._anchored) == len(found._roots) == 1
    assert not found._responses


def test_an_ended_session_s_id_is_free_again():
    found = lineage()
    first = found.recognise("t", chat("task"), 0.0)
    found.forget("other", first)
    assert found.recognise("t", chat("task", "answer", "more"), 0.0) == first
    found.forget("t", first)
    assert found.recognise("t", chat("task"), 1.0) == first


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.booleans()), max_size=40),
    st.integers(1, 6),
)
def test_tables_stay_bounded_and_consistent(steps, most):
    found = lineage(max_sessions=most, idle_s=20.0)
    turns = {}
    for now, (name, tenant, grows) in enumerate(steps):
        turns[name] = turns.get(name, 1) + 2 * grows
        texts = [f"{name} {turn}" for turn in range(turns[name])]
        assert found.recognise(str(tenant), chat(*texts), float(now))
        assert len(found) <= most + 1
        anchored = {c for heirs in found._anchored.values() for c in heirs}
        assert anchored == set(found._live.values())
        assert sum(len(root.suffixes) for root in found._roots.values()) == len(found)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "type", "content", "text", "id", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(
            ["messages", "input", "prompt", "system", "instructions", "tools", "model",
             "previous_response_id"]
        ),
        ODD,
    )
)  # fmt: skip
def test_no_body_raises(body):
    found = lineage()
    session = found.recognise("t", body, 0.0)
    assert session is None or session.isascii()
    assert estimate_tokens(body) >= 0
    prefix = shared_prefix(body)
    assert prefix is None or 0 <= prefix < 1 << 64


def test_lone_surrogates_huge_numbers_and_deep_nesting_are_content_like_other():
    deep = json.loads("[" * 900 + "]" * 900)
    for content in ("\ud800", 1 << 100, deep):
        found = lineage()
        body = {"messages": [said("user", content)]}
        longer = {"messages": [*body["messages"], said("assistant", "a"), said("user", "b")]}
        assert found.recognise("t", body, 0.0) == found.recognise("t", longer, 1.0) is not None
        estimate_tokens(body)


def test_the_shared_prefix_is_system_and_tools_and_nothing_else():
    tools = [{"type": "function", "function": {"name": "run"}}]
    assert shared_prefix(chat("a")) == shared_prefix(chat("b", "c", "d"))
    assert shared_prefix({**chat("a"), "tools": tools}) != shared_prefix(chat("a"))
    other = {"messages": [said("system", "Another."), said("user", "a")]}
    assert shared_prefix(other) != shared_prefix(chat("a"))
    assert shared_prefix({"messages": [said("user", "a")]}) is None
    assert shared_prefix({"prompt": "a"}) is None
    assert shared_prefix({**anthropic("a"), "tools": tools}) is not None


def test_tokens_are_counted_or_estimated_and_images_are_not_text():
    assert estimate_tokens({"prompt": [1, 2, 3]}) == 3
    assert estimate_tokens({"prompt": [[1, 2], [3]]}) == 3
    assert estimate_tokens({}) == 0
    assert estimate_tokens({"prompt": "word " * 1000}) == pytest.approx(1250, rel=0.4)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    body = {"messages": [said("user", [{"type": "text", "text": "what?"}, image])]}
    assert estimate_tokens(body) < 3000
