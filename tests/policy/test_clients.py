"""Whose call is it, by the headers and fields that real clients send."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.clients import Rules, identify
from vllm_saga.policy.identity import session_key

RULES = Rules(session_headers=("x-my-task",))


def caller(headers=None, body=None, rules=RULES):
    return identify(headers or {}, body, rules)


@pytest.mark.parametrize(
    "headers, body, session, source",
    [
        ({}, {"session_id": "b"}, "b", "vllm"),
        ({"x-session-id": "h"}, {}, "h", "vllm"),
        ({"x-session-id": "h"}, {"session_id": "b"}, "b", "vllm"),
        ({"x-session-id": "h"}, {"vllm_xargs": {"session_id": "x"}}, "h", "vllm"),
        ({}, {"vllm_xargs": {"agent_hint": '{"session_id": "a"}'}}, "a", "vllm"),
        ({"x-my-task": "t", "x-claude-code-session-id": "c"}, {}, "t", "operator"),
        ({"x-my-task": "t"}, {"vllm_xargs": {"session_id": "x"}}, "x", "vllm"),
        ({"x-dynamo-session-id": "d", "session-id": "c"}, {}, "d", "dynamo"),
        ({"x-claude-code-session-id": "c"}, None, "c", "claude-code"),
        ({"session-id": "c"}, {"prompt_cache_key": "c"}, "c", "codex"),
        ({"session_id": "old"}, {}, "old", "codex"),
        ({"x-session-affinity": "o"}, {}, "o", "opencode"),
        ({"x-opencode-session": "z"}, {}, "z", "opencode"),
        ({}, {"prompt_cache_key": "k"}, "k", "prompt_cache_key"),
        ({}, {"metadata": {"user_id": "user_1_account_2_session_abc-1"}}, "abc-1", "metadata"),
        ({}, {"metadata": {"user_id": '{"device_id": "d", "session_id": "s"}'}}, "s", "metadata"),
        ({}, {"metadata": {"user_id": "just a user"}}, None, "none"),
        ({}, {"previous_response_id": "resp_1"}, None, "previous_response_id"),
        ({}, {"user": "somebody"}, None, "none"),
    ],
)
def test_the_first_source_that_names_a_session_holds(headers, body, session, source):
    found = caller(headers, body)
    assert (found.session, found.source) == (session, source)


def test_claude_code_s_sub_agents_are_sessions_of_their_own_under_one_root():
    session = {"x-claude-code-session-id": "s"}
    child = {**session, "x-claude-code-agent-id": "a"}
    grandchild = {
        **session,
        "x-claude-code-agent-id": "b",
        "x-claude-code-parent-agent-id": "a",
    }
    root, first, second = caller(session), caller(child), caller(grandchild)
    assert (root.session, root.parent, root.agent) == ("s", None, None)
    assert len({root.session, first.session, second.session}) == 3
    assert first.parent == second.parent == root.session
    assert (first.agent, second.agent) == ("a", "b")
    assert caller(child).session == first.session


def test_codex_threads_are_told_apart_and_the_root_thread_is_the_session():
    root = caller({"session-id": "s", "thread-id": "s"}, {"prompt_cache_key": "s"})
    child = caller(
        {"session-id": "s", "thread-id": "t", "x-codex-parent-thread-id": "s"},
        {"prompt_cache_key": "s"},
    )
    assert (root.session, root.parent, root.agent) == ("s", None, None)
    assert (child.session != "s", child.parent, child.agent) == (True, "s", "t")
    assert not child.conflict


@pytest.mark.parametrize(
    "headers",
    [
        {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"},
        {"session-id": "s", "thread-id": "a"},
    ],
)
def test_a_router_s_word_and_the_client_s_own_are_no_conflict(headers):
    direct = caller(headers)
    routed = caller({**headers, "x-session-id": direct.session})
    assert (routed.source, routed.conflict) == ("vllm", False)
    assert (routed.session, routed.parent) == (direct.session, direct.parent) == ("s:a", "s")
    assert not caller({**headers, "x-session-id": "s"}).conflict
    assert caller({**headers, "x-session-id": "b"}).conflict


@pytest.mark.parametrize(
    "headers, body, parent",
    [
        ({"x-session-id": "c", "x-parent-session-id": "p"}, {}, "p"),
        ({"x-dynamo-session-id": "c", "x-dynamo-parent-session-id": "p"}, {}, "p"),
        (
            {"x-session-id": "c", "x-parent-session-id": "p"},
            {"vllm_xargs": {"saga_parent": "own"}},
            "own",
        ),
        (
            {"x-session-id": "c"},
            {"vllm_xargs": {"agent_hint": '{"parent_session_id": "p"}'}},
            "p",
        ),
        ({"x-session-id": "c", "x-parent-session-id": "c"}, {}, None),
    ],
)
def test_parents(headers, body, parent):
    assert caller(headers, body).parent == parent


@pytest.mark.parametrize(
    "headers, body, last",
    [
        ({"x-dynamo-session-final": "true"}, {}, True),
        ({"x-dynamo-session-final": "false"}, {}, False),
        ({"x-dynamo-session-final": "whatever"}, {}, False),
        ({}, {"vllm_xargs": {"saga_last": 1}}, True),
        ({}, {"vllm_xargs": {"agent_hint": '{"last": true}'}}, True),
        ({}, {}, False),
    ],
)
def test_the_last_call_of_a_session(headers, body, last):
    assert caller(headers, body).last is last


def test_two_names_for_one_session_are_a_conflict_but_a_cache_key_is_none():
    assert caller({"x-session-id": "a", "session-id": "b"}).conflict
    assert caller({"x-session-id": "a"}, {"session_id": "b"}).conflict
    assert not caller({"x-session-id": "a", "session-id": "a"}).conflict
    assert not caller({"x-session-id": "a"}, {"prompt_cache_key": "b"}).conflict


def test_the_tenant_is_what_the_operator_s_header_says():
    headers = {"x-tenant-id": "a", "x-team": "b", "x-llm-d-inference-fairness-id": "c"}
    assert caller(headers).tenant == "a"
    assert caller(headers, rules=Rules(tenant_header="x-team")).tenant == "b"
    assert caller({}).tenant == ""


def test_an_id_is_known_to_the_edge_as_to_the_engine():
    huge = "x" * 10_000
    found = caller({"x-session-id": huge})
    assert ("t", found.session) == session_key("t", huge) == session_key("t", found.session)


@pytest.mark.parametrize("name", ["ümlaut", "line\nbreak", "\ud800", "x" * 5000, "a\0b"])
def test_an_id_from_a_client_is_fit_for_a_header_and_stays_distinct(name):
    found = caller({}, {"prompt_cache_key": name}).session
    other = caller({}, {"prompt_cache_key": name + "!"}).session
    assert found.isascii() and found.isprintable() and len(found) <= 256
    assert found != other


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ("session_id", "vllm_xargs", "prompt_cache_key", "metadata", "previous_response_id")
XARGS = ("session_id", "saga_parent", "saga_last", "agent_hint")
HEADERS = (
    "x-session-id",
    "x-my-task",
    "x-claude-code-session-id",
    "x-claude-code-agent-id",
    "session-id",
    "thread-id",
    "x-parent-session-id",
    "x-dynamo-session-final",
    "x-tenant-id",
)


@given(
    st.dictionaries(st.sampled_from(HEADERS), st.text(max_size=300)),
    st.dictionaries(st.sampled_from(FIELDS), JSON),
    st.none() | st.dictionaries(st.sampled_from(XARGS), JSON | JSON.map(json.dumps)),
)
def test_nothing_that_a_client_sends_raises_and_what_is_found_is_bounded(headers, body, xargs):
    if xargs is not None:
        body["vllm_xargs"] = xargs
    found = caller(headers, body)
    for name in (found.session, found.parent, found.tenant):
        assert name is None or (isinstance(name, str) and len(name) <= 256)
    assert found.session != "" and found.parent != ""
    assert found.session is None or found.session != found.parent
    assert caller(headers, body) == found
    if found.session is not None and found.source != "vllm":
        assert found.session.isascii() and found.session.isprintable()
