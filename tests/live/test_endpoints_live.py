"""A real server with the middleware and the endpoints: clients known by what they really send."""

from __future__ import annotations

import asyncio
import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

from benchmarks.live.server import scrape
from vllm_saga.client import Client as DoctorClient
from vllm_saga.doctor.server import check_server
from vllm_saga.top.view import frame

FLAGS = ("--middleware", "vllm_saga.server.SessionHeaders")
TASK = "Fix the bug in the parser, then run the tests. " * 8
# The name of both plugins: of the one that knows --scheduler-cls saga, too.
PLUGINS = {"VLLM_PLUGINS": "saga"}

# vLLM 0.28 does not take it there, so nobody tells the engine the parent of a sub-agent.
MESSAGES_TAKE_XARGS = "vllm_xargs" in AnthropicMessagesRequest.model_fields

CLAUDE = {"x-claude-code-session-id": "claude-1", "anthropic-version": "2023-06-01"}
CODEX = {"session-id": "codex-1", "thread-id": "codex-1"}


async def post(client, path: str, body: dict[str, Any], **headers: str) -> str:
    url = f"{client.server.url}{path}"
    async with client.http.post(url, json={"model": "model", **body}, headers=headers) as answer:
        text = await answer.text()
        assert answer.status == 200, text
        return text


async def get_json(client, path: str, **headers: str) -> dict[str, Any]:
    async with client.http.get(client.server.url + path, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return json.loads(await answer.text())


async def get_state(client, **headers: str) -> dict[str, Any]:
    return await get_json(client, "/v1/saga/state", **headers)


async def end(client, session: str, **headers: str) -> bool:
    url = f"{client.server.url}/v1/saga/sessions/{session}/end"
    async with client.http.post(url, headers=headers) as answer:
        return json.loads(await answer.text())["ended"]


async def claude_code(client, **more: str) -> None:
    body = {
        "max_tokens": 4,
        "stream": True,
        "system": [{"type": "text", "text": "You are an agent."}],
        "messages": [{"role": "user", "content": TASK + str(more)}],
        "metadata": {"user_id": "user_a_account_b_session_claude-1"},
    }
    text = await post(client, "/v1/messages", body, **CLAUDE, **more)
    assert "event: message_stop" in text


async def codex(client, **headers: str) -> None:
    body = {
        "max_output_tokens": 16,
        "instructions": "You are an agent.",
        "input": [{"type": "message", "role": "user", "content": TASK + str(headers)}],
        "prompt_cache_key": "codex-1",
        "stream": True,
    }
    text = await post(client, "/v1/responses", body, **{**CODEX, **headers})
    assert "response.completed" in text


async def sessions_of(client) -> set[tuple[str, str]]:
    state = await get_state(client)
    return {(tenant, name) for tenant, name in state["sessions"]}


async def workflows_say_what_they_wait_for(client) -> None:
    told = await get_json(client, "/v1/saga/workflows")
    states = {workflow["id"]: workflow["state"] for workflow in told["workflows"]}
    causes = [w["waits_for"] for w in told["workflows"] if w["state"] == "held"]
    assert "running" in states.values() and causes
    assert [cause["ahead"] for cause in causes] == list(range(len(causes)))
    assert causes[0]["short_blocks"] > 0 and causes[0]["needed_blocks"] > 2000 // 32
    # The last one in line, which is held a while yet.
    last = told["workflows"][len(causes) - 1]["id"]
    found = await get_json(client, f"/v1/saga/workflows/{last}")
    assert found["decisions"][0]["what"] == "held" and found["predicted"]["calls_left"] >= 1
    url = f"{client.server.url}/v1/saga/workflows"
    async with client.http.get(f"{url}/{last}", headers={"x-tenant-id": "other"}) as answer:
        assert answer.status == 404
    mine = await get_json(client, "/v1/saga/workflows", **{"x-tenant-id": "t"})
    assert {workflow["tenant"] for workflow in mine["workflows"]} <= {"t"}


async def operators_see_and_check_it(client) -> None:
    told = await get_json(client, "/v1/saga/workflows?limit=500")
    console = Console(width=100, file=StringIO())
    console.print(frame(told, client.server.url, 100, 100))
    assert "codex-1" in console.file.getvalue() and "KV pool" in console.file.getvalue()
    async with DoctorClient(client.server.url) as asked:
        found = {finding.check: finding for finding in await check_server(asked)}
    wanted = ("server", "scheduler", "prefix caching", "KV pool", "middleware")
    assert {found[check].level for check in wanted} == {"ok"}, found


@pytest.mark.smoke
async def test_clients_are_known_by_their_headers_and_sessions_end(serve):
    async with serve("saga", *FLAGS, env=PLUGINS, tenant_source="saga_tenant") as client:
        await claude_code(client)
        await claude_code(client, **{"x-claude-code-agent-id": "agent-7"})
        await codex(client)
        await codex(client, **{"thread-id": "t2", "x-codex-parent-thread-id": "codex-1"})
        await client.generate([7] * 64, 4, headers={"x-session-affinity": "open-1"})
        final = {"X-Dynamo-Session-ID": "dynamo-1", "X-Dynamo-Session-Final": "true"}
        await client.generate([8] * 64, 4, headers=final)
        await client.generate(
            [9] * 64, 4, headers={"session-id": "c", "x-tenant-id": "t"}, session_id="body-wins"
        )
        state = await get_state(client)
        assert {(tenant, name) for tenant, name in state["sessions"]} == {
            ("", "claude-1"), ("", "claude-1:agent-7"), ("", "codex-1"), ("", "codex-1:t2"),
            ("", "open-1"), ("t", "body-wins"),
        }  # fmt: skip
        # Sub-agents are in their root's workflow.
        workflows = 4 if MESSAGES_TAKE_XARGS else 5
        assert state["saga"]["idle"] == workflows and state["saga"]["sessions_ended"] == 1
        assert state["kv_tokens"] > 0 and state["running"] == state["waiting"] == 0
        assert state == await get_state(client, **{"x-data-parallel-rank": "0"})

        assert not await end(client, "body-wins")
        assert await end(client, "body-wins", **{"x-tenant-id": "t"})
        assert await end(client, "claude-1:agent-7") and await end(client, "open-1")
        assert await sessions_of(client) == {
            ("", "claude-1"), ("", "codex-1"), ("", "codex-1:t2"),
        }  # fmt: skip

        busy = asyncio.gather(
            *(client.generate([100 + n] * 2000, 900, session_id=f"s{n}") for n in range(12))
        )
        held = {}
        while not held and not busy.done():
            await asyncio.sleep(0.1)
            state = await get_state(client)
            held = {call["session"]: call for call in state["held_calls"]}
        assert held and held.keys() <= {f"s{n}" for n in range(12)}
        assert all(call["new"] and call["tokens"] == 2000 for call in held.values())
        await workflows_say_what_they_wait_for(client)
        await busy
        await operators_see_and_check_it(client)

        metrics = await scrape(client.http, client.server.url)
        assert metrics["vllm:saga_id_conflicts_total"] == 1
        assert metrics["vllm:saga_callers_total"] >= 7
        assert "the policy failed" not in client.log()


@pytest.mark.switch("SAGA_TEST_RANKS", "minutes")
async def test_ranks_report_each_for_itself(serve):
    env = {**PLUGINS, "VLLM_CPU_OMP_THREADS_BIND": "auto"}
    async with serve("saga", *FLAGS, "--data-parallel-size", "2", blocks=100, env=env) as client:
        for rank in range(2):
            headers = {"session-id": f"on-{rank}", "x-data-parallel-rank": str(rank)}
            await client.generate([5 + rank] * 64, 4, headers=headers)
        for rank in range(2):
            state = await get_state(client, **{"x-data-parallel-rank": str(rank)})
            assert state["sessions"] == [["", f"on-{rank}"]]
        assert len((await get_state(client))["ranks"]) == 2
        assert await end(client, "on-0") and await end(client, "on-1")
        assert await sessions_of(client) == set()


async def test_an_engine_without_saga_says_so(serve):
    async with serve("stock", *FLAGS, env=PLUGINS) as client:
        await client.generate([5] * 64, 4, headers=CODEX)
        url = f"{client.server.url}/v1/saga/state"
        async with client.http.get(url) as answer:
            assert answer.status == 404 and "--scheduler-cls saga" in await answer.text()
