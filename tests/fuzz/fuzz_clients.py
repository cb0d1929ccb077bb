"""Fuzzers of what clients send: hints, headers, bodies, and the requests made of them."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

from fuzz_registry import fuzzes
from fuzz_shapes import changed, encoded, scalars, shallow, texts, values
from hypothesis import strategies as st
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash

from vllm_saga.config import SagaConfig
from vllm_saga.engine.hints import read_arrival
from vllm_saga.policy.clients import Rules, identify
from vllm_saga.policy.hints import DEFAULT_LIMITS, no_counts, read_hint
from vllm_saga.policy.messages import MessageLineage, read_response_id
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.tools import ToolNames
from vllm_saga.policy.turns import estimate_tokens, read_turns, shared_prefix
from vllm_saga.router.bodies import Body, Budget
from vllm_saga.router.edge import Edge
from vllm_saga.router.usage import Usage
from vllm_saga.server import SessionHeaders
from vllm_saga.server.body import JsonBody
from vllm_saga.simulator.driver import make_request

init_none_hash(sha256)

HINT = {
    "session_id": "s", "parent_session_id": "p",
    "cache_control": {"type": "ephemeral", "ttl": "5m"},
    "next_tool": ["bash", "edit"], "expected_gap_s": 1.5, "expected_tool_duration_ms": 20,
    "steps_left": 3, "deadline_s": 60.0, "slo_factor": 2.0, "last": False, "priority": 1,
}  # fmt: skip
hints = changed(st.just(HINT), 5) | values
sent_hints = hints | encoded(hints).map(lambda data: data.decode("utf-8", "replace")) | texts

CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "you are"},
        {"role": "user", "content": [{"type": "text", "text": "do"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ],
    "tools": [{"type": "function", "function": {"name": "bash", "parameters": {}}}],
    "session_id": "s", "prompt_cache_key": "k", "cache_salt": "salt",
    "metadata": {"user_id": "user_1_account_2_session_3"},
    "vllm_xargs": {"saga_parent": "p", "saga_last": 0, "agent_hint": json.dumps(HINT)},
}  # fmt: skip
RESPONSES = {
    "model": "m", "instructions": "you are", "previous_response_id": "resp_1",
    "input": [{"role": "user", "content": "do"}, {"type": "reasoning"}, {"type": "function_call"}],
}  # fmt: skip
#: JSON in a text: of Claude Code, and nested as far as a text of this length can be.
USERS = ('{"session_id": "s", "device": [[]]}', '{"session_id": 1}', '{"a": ' + "[" * 4000, "{")
COMPLETION = {"model": "m", "prompt": [1, 2, 3] * 300}
users = st.sampled_from(USERS).map(lambda user: {"metadata": {"user_id": user}})
bodies = changed(st.sampled_from([CHAT, RESPONSES, COMPLETION]) | users, 4) | values

NAMES = (
    "x-session-id", "x-claude-code-session-id", "x-claude-code-agent-id", "session-id", "thread-id",
    "x-session-affinity", "x-opencode-session", "x-dynamo-session-id", "x-parent-session-id",
    "x-dynamo-parent-session-id", "x-dynamo-session-final", "x-tenant-id", "x-task",
)  # fmt: skip
latin = st.text(st.characters(max_codepoint=255), max_size=40)
headers = st.dictionaries(st.sampled_from(NAMES), latin | texts, max_size=5)
RULES = Rules(("x-task",))


@fuzzes("hints", sent_hints)
def check_hints(sent: Any) -> None:
    counts = no_counts()
    known = set(counts)
    hint, session, parent = read_hint(sent, DEFAULT_LIMITS, counts)
    assert counts.keys() == known and all(count >= 0 for count in counts.values())
    for name in (session, parent):
        assert name is None or (isinstance(name, str) and name)
    if hint is not None:
        limits = DEFAULT_LIMITS
        for value, most in (
            (hint.gap_s, limits.max_gap_s), (hint.ttl_s, limits.max_ttl_s),
            (hint.steps_left, limits.max_steps), (hint.deadline_s, limits.max_deadline_s),
            (hint.slo_factor, limits.max_slo_factor),
        ):  # fmt: skip
            assert value is None or (math.isfinite(value) and 0 <= value <= most)


EXTRA = {
    "session_id": "s", "saga_parent": "p", "saga_last": 1, "saga_tenant": "t",
    "agent_hint": json.dumps(HINT),
}  # fmt: skip
extras = changed(st.just(EXTRA), 4) | st.dictionaries(
    st.sampled_from(list(EXTRA)), sent_hints, max_size=5
)
arrivals = st.tuples(
    extras | st.none() | values, texts | st.none(), texts | st.none() | scalars,
    st.sampled_from(["cache_salt", "saga_tenant", "none"]), st.integers(1, 60),
)  # fmt: skip


@fuzzes("requests", st.lists(arrivals, max_size=6))
def check_requests(calls: list[Any]) -> None:
    """Requests with these extras are read, and the policy can work with what was read."""
    config = SagaConfig.model_validate({"slo_factor": 2.0, "session_idle_s": 100.0})
    saga, counts = SagaPolicy(config, 20, 16), no_counts()
    for number, (extra, salt, session, source, length) in enumerate(calls):
        now = float(number)
        request = make_request(f"r{number}", [number] * length, 4)
        request.sampling_params.extra_args = extra
        request.cache_salt, request.session_id = salt, session
        arrival = read_arrival(request, False, counts, DEFAULT_LIMITS, source)
        assert len(arrival.tenant) <= 300
        saga.on_arrival(arrival, now)
        saga.on_step(now)
        saga.state()
    for number in range(len(calls)):
        saga.on_finish(f"r{number}", 100, 100.0 + number, ("bash",))
        saga.on_step(100.0 + number)
    saga.on_step(1e6)
    assert saga.state()["sessions"] == saga.state()["calls"] == 0


@fuzzes("callers", st.tuples(headers, bodies))
def check_callers(given: Any) -> None:
    sent, body = given
    caller = identify(sent, body, RULES)
    for name in (caller.session, caller.parent, caller.agent, caller.tenant):
        assert name is None or (isinstance(name, str) and len(name) <= 4096)
    assert caller.session != ""


@fuzzes("messages", st.lists(st.tuples(st.sampled_from(["a", "b"]), bodies), max_size=5))
def check_messages(calls: list[Any]) -> None:
    lineage = MessageLineage(2, 50.0)
    for number, (tenant, body) in enumerate(calls):
        if not isinstance(body, dict):
            continue
        session = lineage.recognise(tenant, body, float(number))
        assert session is None or len(session) <= 300
        assert len(lineage) <= 3
        assert estimate_tokens(body) >= 0
        prefix = shared_prefix(body)
        assert prefix is None or 0 <= prefix < 1 << 64
        turns = read_turns(body)
        if turns is not None:
            assert 0 <= turns.opening <= len(turns.parts)
            assert all(isinstance(part, bytes) for part in turns.parts)


@fuzzes("server-bodies", encoded(bodies) | st.binary(max_size=200))
def check_server_bodies(data: bytes) -> None:
    try:
        body = JsonBody(data)
    except ValueError:
        return
    more = body.with_xargs({"saga_parent": "p", "n": 1})
    before = as_vllm_reads(data)
    again = as_vllm_reads(more)
    assert (again is None) == (before is None)
    if before is not None and again is not None:
        assert again["vllm_xargs"]["saga_parent"] == "p"
        assert again.keys() == before.keys() | {"vllm_xargs"}


def as_vllm_reads(data: bytes) -> dict[str, Any] | None:
    """None: it is refused there, whatever we do."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    assert isinstance(found, dict)
    return found


raw_headers = st.lists(
    st.tuples(
        st.sampled_from([*NAMES, "content-length", "content-type"]).map(str.encode)
        | st.binary(max_size=8),
        latin.map(lambda text: text.encode("latin-1")) | st.binary(max_size=20),
    ),
    max_size=6,
)
#: Header pairs, body, pieces of it, whether the tenant is the header's, path.
http = st.tuples(
    raw_headers,
    encoded(bodies) | st.binary(max_size=100),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["/v1/chat/completions", "/v1/messages", "/other", ""]),
)


@fuzzes("middleware", http)
def check_middleware(given: Any) -> None:
    """The application is called once, with a body that says what it said before."""
    pairs, data, pieces, by_tenant, path = given
    saga = {"tenant_source": "saga_tenant"} if by_tenant else {}
    state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"saga": saga}))
    seen: list[bytes] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        seen.append(body)

    size = -(-len(data) // pieces) or 1
    parts = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
    messages = iter(
        {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)}
        for index, part in enumerate(parts)
    )

    async def receive() -> Any:
        return next(messages)

    scope = {
        "type": "http", "method": "POST", "path": path, "headers": pairs,
        "app": SimpleNamespace(state=state),
    }  # fmt: skip
    asyncio.run(SessionHeaders(application)(scope, receive, lambda message: None))  # type: ignore[arg-type,return-value]
    (body,) = seen
    if body != data:
        before, after = as_vllm_reads(data), as_vllm_reads(body)
        assert (after is None) == (before is None)
        if before is not None and after is not None:
            assert after.keys() == before.keys() | {"vllm_xargs"}


@fuzzes("router-bodies", encoded(bodies) | st.binary(max_size=200))
def check_router_bodies(data: bytes) -> None:
    found = Body(data, None, Budget(1 << 20)).decode()
    assert found is None or isinstance(found, dict)


PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize")
calls = st.tuples(st.sampled_from(PATHS), headers, encoded(bodies))


@fuzzes("router-callers", st.lists(calls, max_size=4))
def check_router_callers(given: list[Any]) -> None:
    """The router's guard is there for bugs; no input may need it."""
    edge = Edge(RULES, 2, 50.0)
    for number, (path, sent, data) in enumerate(given):
        body = Body(data, None, Budget(1 << 20)).decode()
        found = edge.recognise(f"c{number}", path, sent, body, float(number))
        assert edge.errors == 0
        assert found.arrival.prompt_tokens >= 0
        assert found.forward is None or (found.forward.isascii() and found.forward.isprintable())


@fuzzes("answers", st.lists(encoded(shallow) | st.binary(max_size=60), max_size=5))
def check_answers(pieces: list[bytes]) -> None:
    """What engines answer, read in passing."""
    usage = Usage(10, True)
    for piece in pieces:
        usage.feed(piece)
        read_response_id(piece)
    total = usage.total_tokens()
    assert total is None or total >= 0


MARKS = (
    '<tool_call>{"name": "bash", "arguments": {}}</tool_call>', "<function=bash>", "[TOOL_CALLS]",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>bash", '<invoke name="bash">', "```bash\n",
    "</think>",
    "<|tool_call_begin|>functions.bash:0", " to=functions.bash", "[bash(a=1), bash(", '"name"', " ",
)  # fmt: skip


@fuzzes("outputs", st.lists(st.sampled_from(MARKS) | texts, max_size=30).map("".join))
def check_outputs(text: str) -> None:
    """A model's output is a client's, too: it says what to write."""
    names = ToolNames().read(text)
    assert len(names) <= 32 and all(len(name) <= 128 for name in names)
