"""Ids and hints on real vLLM requests, from the HTTP body's model to the policy's arrival."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_saga.engine.hints import read_arrival, read_tenant
from vllm_saga.policy.hints import Hint, HintLimits, no_counts
from vllm_saga.simulator.driver import make_request

TEXT = json.dumps(
    {
        "session_id": "worker-7",
        "parent_session_id": "orchestrator-1",
        "cache_control": {"type": "ephemeral", "ttl": "5m"},
        "next_tool": ["Read", "Bash"],
        "expected_tool_duration_ms": 1500,
        "steps_left": 4,
    }
)
HINT = Hint(next_tool="Bash+Read", gap_s=1.5, steps_left=4, ttl_s=300.0)


def request_with(extra, **fields):
    request = make_request("r", [1, 2, 3], 1, **fields)
    request.sampling_params.extra_args = extra
    return request


def read(extra, *, session_id=None, **options):
    counts = no_counts()
    request = request_with(extra, session_id=session_id)
    arrival = read_arrival(request, True, counts, **options)
    return arrival, arrival.hint, {outcome: count for outcome, count in counts.items() if count}


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": {}}])
def test_a_plain_request_is_only_what_vllm_says_of_it(extra):
    arrival, hint, outcomes = read(extra)
    assert (arrival.call_id, arrival.prompt_tokens, arrival.tokens) == ("r", 3, [1, 2, 3])
    assert (arrival.session_id, arrival.parent_id, arrival.last) == (None, None, False)
    assert hint is None and outcomes == {}


def test_an_agent_hint_gives_ids_and_a_hint():
    arrival, hint, outcomes = read({"agent_hint": TEXT})
    assert (arrival.session_id, arrival.parent_id) == ("worker-7", "orchestrator-1")
    assert hint == HINT and not arrival.last
    assert outcomes == {"accepted": 1}


def test_an_agent_hint_that_got_through_as_an_object_is_read_as_its_text():
    assert read({"agent_hint": json.loads(TEXT)})[1] == HINT


def test_flat_keys_are_read_as_before():
    arrival, hint, outcomes = read({"session_id": "s", "saga_parent": 5, "saga_last": 1})
    assert (arrival.session_id, arrival.parent_id, arrival.last) == ("s", "5", True)
    assert hint is None and outcomes == {}


@pytest.mark.parametrize(
    "own, flat, hinted, chosen, conflicts",
    [
        ("a", "b", "c", "a", 2),
        ("a", None, "a", "a", 0),
        (None, "b", "c", "b", 1),
        (None, "", "c", "c", 0),
        (None, ["b"], "c", "c", 0),
        ("a", None, "c", "a", 1),
        (None, 7, "7", "7", 0),
    ],
)
def test_ids_by_precedence_and_conflicts_counted(own, flat, hinted, chosen, conflicts):
    extra = {"session_id": flat, "agent_hint": {"session_id": hinted}}
    arrival, _, outcomes = read(extra, session_id=own)
    assert arrival.session_id == chosen
    assert outcomes.get("conflict", 0) == conflicts


def test_two_parents_are_a_conflict_and_the_flat_one_holds():
    arrival, _, outcomes = read({"saga_parent": "p", "agent_hint": {"parent_session_id": "q"}})
    assert arrival.parent_id == "p"
    assert outcomes == {"accepted": 1, "conflict": 1}


@pytest.mark.parametrize("extra", [{"saga_last": "yes"}, {"agent_hint": '{"last": true}'}])
def test_either_source_says_that_a_call_is_the_last(extra):
    assert read(extra)[0].last


def test_bad_flat_keys_are_counted():
    arrival, _, outcomes = read({"session_id": [1], "saga_parent": 0.5, "saga_last": "perhaps"})
    assert (arrival.session_id, arrival.parent_id, arrival.last) == (None, None, False)
    assert outcomes == {"wrong_type": 2, "bad_value": 1}


def test_limits_are_the_operator_s():
    _, hint, outcomes = read({"agent_hint": TEXT}, limits=HintLimits(max_gap_s=1.0))
    assert hint.gap_s == 1.0 and outcomes == {"accepted": 1, "clamped": 1}
    arrival, hint, outcomes = read(
        {"agent_hint": TEXT, "session_id": "s"}, limits=HintLimits(enabled=False)
    )
    assert arrival.session_id == "s" and hint is None and outcomes == {"off": 1}


def test_a_priority_in_a_hint_changes_nothing():
    arrival, hint, outcomes = read({"agent_hint": '{"priority": 9}'})
    assert arrival.priority == 0 and hint is None and outcomes == {"priority": 1}


@pytest.mark.parametrize(
    "source, tenant, untrusted",
    [("cache_salt", "salt", 1), ("saga_tenant", "team", 0), ("none", "", 1)],
)
def test_the_tenant_comes_from_the_one_source_that_the_operator_named(source, tenant, untrusted):
    request = request_with({"saga_tenant": "team"})
    request.cache_salt = "salt"
    counts = no_counts()
    assert read_tenant(request, source, counts) == tenant
    assert read_arrival(request, True, counts, tenant_source=source).tenant == tenant
    assert counts["untrusted"] == 2 * untrusted


def test_a_gateway_that_names_no_tenant_does_not_make_the_salt_one():
    request = request_with({"saga_tenant": ["team"]})
    request.cache_salt = "salt"
    counts = no_counts()
    assert read_tenant(request, "saga_tenant", counts) == ""
    assert counts["wrong_type"] == 1


# -- through vLLM's own request models ----------------------------------------------------------


def chat(**body):
    message = {"role": "user", "content": "hello"}
    return ChatCompletionRequest.model_validate({"model": "m", "messages": [message], **body})


def test_the_engine_gets_an_agent_hint_of_vllm_xargs_unchanged():
    """Body, then SamplingParams, then the engine core's wire format, then its Request."""
    sent = chat(vllm_xargs={"agent_hint": TEXT, "saga_tenant": "team", "saga_last": True})
    params = sent.to_sampling_params(max_tokens=8, default_sampling_params={})
    decoder = MsgpackDecoder(SamplingParams)
    params = decoder.decode(MsgpackEncoder().encode(params))
    assert params.extra_args["agent_hint"] == TEXT
    request = Request("r", [1, 2], params, None)
    counts = no_counts()
    arrival = read_arrival(request, False, counts, tenant_source="saga_tenant")
    hint = arrival.hint
    assert hint == HINT
    assert (arrival.session_id, arrival.tenant, arrival.last) == ("worker-7", "team", True)


@pytest.mark.parametrize("header", [None, "from-header"])
@pytest.mark.parametrize("body", [None, "from-body"])
def test_vllm_s_own_precedence_of_ids_is_not_overruled(body, header):
    sent = chat(
        vllm_xargs={"session_id": "flat", "agent_hint": TEXT},
        **({"session_id": body} if body else {}),
    )
    raw = SimpleNamespace(headers={"X-Session-ID": header} if header else {})
    own = GenerateBaseServing._get_session_id(sent, raw)
    params = sent.to_sampling_params(max_tokens=8, default_sampling_params={})
    request = Request("r", [1, 2], params, None, session_id=own)
    assert read_arrival(request, False, no_counts()).session_id == (body or header or "flat")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = scalars | st.lists(scalars, max_size=4) | st.dictionaries(st.text(max_size=4), scalars)
keys = st.sampled_from(["session_id", "saga_parent", "saga_last", "saga_tenant", "agent_hint"])


@settings(max_examples=200)
@given(
    st.none() | st.dictionaries(keys | st.text(max_size=5), values, max_size=6),
    st.sampled_from(["cache_salt", "saga_tenant", "none"]),
)
def test_any_extra_args_are_read_without_an_error(extra, source):
    arrival, hint, _ = read(extra, tenant_source=source)
    for name in (arrival.session_id, arrival.parent_id):
        assert name is None or (isinstance(name, str) and name)
    assert isinstance(arrival.tenant, str) and isinstance(arrival.last, bool)
    assert hint is None or isinstance(hint, Hint)
