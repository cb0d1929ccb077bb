"""What a soak says of what it has measured, and what its agents count."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from benchmarks.soak import record
from benchmarks.soak.agents import Agents, Caller, Pace
from benchmarks.soak.record import Sample

MB = 1 << 20
CLIENT = {
    "begun": 10, "answered": 7, "aborted": 2, "refused": 1, "failed": 0, "ended": 2, "last": 1,
    "probes": 1,
}  # fmt: skip
METRICS = {
    "vllm:request_success_total": 8.0, "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0, "vllm:saga_active": 1.0, "vllm:saga_holds_total": 5.0,
    "vllm:saga_hold_seconds_count": 3.0, "vllm:saga_holds_aborted_total": 1.0,
    "vllm:saga_sessions_ended_total": 3.0,
}  # fmt: skip


def sample(at_s: float, server: int = 600, **tables: int) -> Sample:
    sizes = dict.fromkeys((*record.TABLES, "classes"), 0) | tables
    return Sample(at_s, {"server 1": server * MB, "engine 2": 500 * MB}, sizes, METRICS, CLIENT)


FLAT = [sample(10.0 * n, 600 + n % 3) for n in range(40)]


def test_a_run_of_which_all_holds_has_no_problems():
    assert record.problems(FLAT, sample(500.0), []) == []


def test_what_grows_at_first_only_is_flat_and_what_goes_on_growing_is_not():
    warm = [sample(10.0 * n, 400 + min(20 * n, 200)) for n in range(40)]
    assert record.problems(warm, sample(500.0), []) == []
    leaking = [sample(10.0 * n, 600 + n) for n in range(40)]
    (problem,) = record.problems(leaking, sample(500.0), [])
    assert problem.startswith("memory of server 1 grows")


def test_a_process_that_died_is_a_problem():
    last = replace(sample(500.0), rss_bytes={"server 1": 600 * MB, "engine 3": 1})
    told = " ".join(record.problems(FLAT, last, []))
    assert "engine 2" in told and "engine 3" in told


@pytest.mark.parametrize("table", record.TABLES)
def test_an_entry_that_is_left_is_a_problem(table):
    assert record.problems(FLAT, sample(500.0, **{table: 1}), []) == [f"table {table}: 1 left"]


@pytest.mark.parametrize(
    "client, metrics",
    [
        ({"begun": 11}, {}),
        ({}, {"vllm:request_success_total": 6.0}),
        ({}, {"vllm:request_success_total": 12.0}),
        ({}, {"vllm:saga_holds_total": 3.0}),
        ({}, {"vllm:saga_sessions_ended_total": 4.0}),
        ({}, {"vllm:saga_held_calls": 1.0}),
        ({}, {"vllm:saga_policy_failures_total": 1.0}),
        ({}, {"vllm:saga_active": 0.0}),
        ({}, {"vllm:num_requests_waiting": 1.0}),
        ({}, {"saga_router_in_flight": 1.0}),
    ],
)
def test_counters_that_do_not_add_up_are_a_problem(client, metrics):
    last = replace(sample(500.0), client=CLIENT | client, metrics=METRICS | metrics)
    (problem,) = record.problems(FLAT, last, [])
    assert problem.startswith("does not hold")


def test_it_is_drawn(tmp_path):
    record.plot(FLAT, sample(500.0), tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


async def test_agents_of_every_kind_call_and_every_call_is_accounted_for():
    seen = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/end"):
            return web.json_response({"ended": True})
        body = await request.json()
        seen.append((request.headers.get("X-Session-ID"), body))
        if isinstance(body.get("vllm_xargs"), str):
            return web.json_response({}, status=400)
        if body["stream"]:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"data: {}\n\n")
            await asyncio.sleep(60)
        return web.json_response({"choices": [{"token_ids": [1] * body["max_tokens"]}]})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    stop = asyncio.Event()
    try:
        async with aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            caller = Caller(http, url, Pace(1000.0))
            agents = Agents(caller, 3)
            agents._gap = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
            asyncio.get_running_loop().call_later(1.0, stop.set)
            await agents.run(4, stop)
    finally:
        await runner.cleanup()
    counts = caller.counts
    assert not caller.errors and len(agents.kinds) == 7
    assert counts["begun"] == len(seen) == sum(
        counts[name] for name in ("answered", "aborted", "refused")
    )  # fmt: skip
    assert counts["ended"] and counts["aborted"] and counts["hinted"]
    lasts = [b for _, b in seen if isinstance(b.get("vllm_xargs"), dict)
             and b["vllm_xargs"].get("saga_last") == 1]  # fmt: skip
    assert counts["last"] == len(lasts)
    hints = [json.loads(b["vllm_xargs"]["agent_hint"]) for s, b in seen if s and "linear" in s
             and "agent_hint" in b.get("vllm_xargs", {})]  # fmt: skip
    assert len(hints) == counts["hinted"]
