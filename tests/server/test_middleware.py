"""SessionHeaders: what vLLM sees of a request, and that nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from vllm_saga.server import SessionHeaders, middleware

CHAT = "/v1/chat/completions"
CLAUDE = {"X-Claude-Code-Session-Id": "s"}
CHILD = {**CLAUDE, "X-Claude-Code-Agent-Id": "a"}


class Seen:
    """An application: what it was given, and what its client got."""

    def __init__(self, saga: dict[str, object] | None = None) -> None:
        config = SimpleNamespace(additional_config={"saga": saga or {}})
        self.app = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
        self.sent: list[dict[str, object]] = []
        self._middleware = SessionHeaders(self._answer)

    async def _answer(self, scope, receive, send) -> None:
        self.headers = {
            k.decode().lower(): v.decode("latin-1") for k, v in scope.get("headers", [])
        }
        self.messages = []
        while not self.messages or self.messages[-1].get("more_body"):
            self.messages.append(await receive())
        self.following = await receive()
        self.body = b"".join(m.get("body", b"") for m in self.messages)
        for piece in (b"data: 1\n\n", b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": piece})

    async def post(
        self,
        body: object,
        headers: dict[str, str] | None = None,
        path: str = CHAT,
        pieces: int = 1,
        **scope: object,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        sent |= headers or {}
        size = -(-len(data) // pieces) or 1
        parts = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
        await self.receive(
            [
                {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)}
                for index, part in enumerate(parts)
            ],
            {
                "type": "http",
                "method": "POST",
                "path": path,
                "headers": [(k.encode(), v.encode("latin-1")) for k, v in sent.items()],
                "app": self.app,
                **scope,
            },
        )
        self.original = data

    async def receive(self, messages, scope) -> None:
        left = iter(messages)

        async def receive():
            return next(left, {"type": "http.disconnect"})

        async def send(message):
            self.sent.append(message)

        await self._middleware(scope, receive, send)

    @property
    def session(self) -> str | None:
        return self.headers.get("x-session-id")

    @property
    def xargs(self) -> dict[str, object] | None:
        return json.loads(self.body).get("vllm_xargs")


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/invocations"]
)
async def test_a_session_becomes_vllm_s_header_and_the_body_stays(path):
    seen = Seen()
    await seen.post({"messages": []}, CLAUDE, path, pieces=3)
    assert seen.session == "s" and seen.body == seen.original
    assert seen.following == {"type": "http.disconnect"}
    assert [m["body"] for m in seen.sent] == [b"data: 1\n\n", b"data: [DONE]\n\n"]


async def test_a_parent_goes_into_the_body_beside_what_is_there():
    seen = Seen()
    body = {"messages": [1, {"vllm_xargs": 2}], "vllm_xargs": {"mine": 1.5}}
    await seen.post(body, CHILD, pieces=2)
    assert seen.session == "s:a"
    assert json.loads(seen.body) == {**body, "vllm_xargs": {"mine": 1.5, "saga_parent": "s"}}
    assert seen.headers["content-length"] == str(len(seen.body))


@pytest.mark.parametrize("body", [b"{}", b" { } \n", b'{"a":{}}', b'{"a": [1]}\n'])
async def test_any_object_can_be_extended(body):
    seen = Seen()
    await seen.post(body, {"X-Dynamo-Session-ID": "d", "X-Dynamo-Session-Final": "true"})
    assert json.loads(seen.body) == {**json.loads(body), "vllm_xargs": {"saga_last": 1}}


@pytest.mark.parametrize(
    "body, headers, session",
    [
        ({"session_id": "b"}, CLAUDE, "b"),
        ({"vllm_xargs": {"session_id": "x"}}, CLAUDE, "x"),
        ({}, {**CLAUDE, "x-session-id": "h"}, "h"),
        ({"session_id": "b"}, {**CLAUDE, "x-session-id": "h"}, "h"),
        ({"prompt_cache_key": "k"}, {}, "k"),
        ({"session_id": "ümlaut"}, {}, None),
    ],
)
async def test_vllm_s_own_ids_are_never_overridden(body, headers, session):
    seen = Seen()
    await seen.post(body, headers)
    assert seen.session == session and seen.body == seen.original


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"null", b"[" * 5000, b'{"a":' * 5000, b"0" * 5000],
)
async def test_a_body_that_makes_no_sense_is_left_to_vllm(body):
    seen = Seen()
    await seen.post(body, CHILD)
    assert seen.body == body and seen.session == "s:a"


async def test_other_paths_and_methods_pass_as_they_are():
    seen = Seen()
    await seen.post({"session_id": "b"}, {}, "/v1/messages/count_tokens", pieces=2)
    assert len(seen.messages) == 2 and seen.session is None
    await seen.post({}, CHILD, "/inference/v1/generate")
    assert seen.body == b"{}" and seen.session == "s:a"
    scope = {"type": "lifespan"}
    await seen.receive([], scope)
    assert scope == {"type": "lifespan"}


async def test_a_root_path_is_not_part_of_the_path():
    seen = Seen()
    await seen.post({"prompt_cache_key": "k"}, {}, f"/api{CHAT}", root_path="/api")
    assert seen.session == "k"


@pytest.mark.parametrize("announced", [True, False])
async def test_a_large_body_streams_and_its_headers_still_count(monkeypatch, announced):
    monkeypatch.setattr(middleware, "_MAX_BODY_BYTES", 1000)
    seen = Seen()
    body = {"prompt_cache_key": "k", "prompt": "x" * 5000}
    headers = {} if announced else {"Content-Length": "nonsense"}
    await seen.post(body, {**headers, **CHILD}, pieces=20)
    assert len(seen.messages) == 20 and seen.body == seen.original
    assert seen.session == "s:a"


async def test_a_client_that_leaves_while_it_sends_is_passed_on():
    seen = Seen()
    half = {"type": "http.request", "body": b'{"a"', "more_body": True}
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "app": seen.app}
    await seen.receive([half], scope)
    assert [m["type"] for m in seen.messages] == ["http.request", "http.disconnect"]


@pytest.mark.parametrize("body", [{}, {"vllm_xargs": {"saga_tenant": "theirs"}}])
async def test_the_tenant_is_the_gateway_s_word_where_the_engine_takes_it(body):
    seen = Seen({"tenant_source": "saga_tenant", "tenant_header": "X-Team"})
    await seen.post(body, {"x-team": "ours"})
    assert seen.xargs == {"saga_tenant": "ours"}
    await seen.post(body)
    assert seen.xargs == {"saga_tenant": ""}
    seen = Seen()
    await seen.post(body, {"x-tenant-id": "ours"})
    assert seen.body == seen.original


@pytest.mark.parametrize(
    "body",
    [
        b'{"x": NaN, "vllm_xargs": {"saga_tenant": "theirs"}}',
        b'{"x": "\\ud800", "vllm_xargs": {"saga_tenant": "theirs"}}',
        '{"vllm_xargs": {"saga_tenant": "theirs"}}'.encode("utf-16"),
        b'{"vllm_xargs": {}, "vllm_xargs": {"saga_tenant": "theirs"}}',
        b'{"x": "' + b"y" * 5000 + b'", "vllm_xargs": {"saga_tenant": "theirs"}}',
        b'{"vllm_xargs": {"n": 123456789012345678901234567890}}',
    ],
)
async def test_no_body_smuggles_a_tenant_past_the_gateway(monkeypatch, body):
    monkeypatch.setattr(middleware, "_MAX_BODY_BYTES", 1000)
    seen = Seen({"tenant_source": "saga_tenant"})
    await seen.post(body, {"x-tenant-id": "ours"})
    assert seen.xargs["saga_tenant"] == "ours"


async def test_the_operator_s_headers_name_sessions_too(monkeypatch, tmp_path):
    seen = Seen({"session_headers": ["X-My-Task"]})
    await seen.post({}, {"x-my-task": "t", **CLAUDE})
    assert seen.session == "t"
    file = tmp_path / "saga.yaml"
    file.write_text("session_headers: [x-other]")
    monkeypatch.setenv("SAGA_CONFIG", str(file))
    seen = Seen()
    await seen.post({}, {"x-my-task": "t", "x-other": "o"})
    assert seen.session == "o"


async def test_callers_and_conflicts_are_counted():
    def count(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    seen = Seen()
    callers = count("vllm:saga_callers_total", source="claude-code")
    conflicts = count("vllm:saga_id_conflicts_total")
    await seen.post({}, CLAUDE)
    await seen.post({}, {**CLAUDE, "session-id": "other"})
    assert count("vllm:saga_callers_total", source="claude-code") == callers + 2
    assert count("vllm:saga_id_conflicts_total") == conflicts + 1


def test_it_is_light_to_import():
    script = (
        "import sys, vllm_saga.server; assert not {'vllm', 'torch', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@given(
    st.binary(max_size=200) | st.dictionaries(st.text(max_size=5), st.integers() | st.text()),
    st.dictionaries(
        st.sampled_from(["x-session-id", "session-id", "thread-id", "x-tenant-id"]),
        st.text(alphabet=st.characters(max_codepoint=255), max_size=20),
    ),
    st.integers(1, 5),
    st.booleans(),
)
async def test_whatever_comes_reaches_vllm(body, headers, pieces, by_tenant):
    seen = Seen({"tenant_source": "saga_tenant"} if by_tenant else {})
    await seen.post(body, headers, pieces=pieces)
    if isinstance(body, dict):
        assert json.loads(seen.body).items() >= {
            key: value for key, value in body.items() if key != "vllm_xargs"
        }.items()  # fmt: skip
    else:
        assert seen.body == body or json.loads(body) is not None
