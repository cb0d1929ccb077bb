"""Invariant 4 on a real server: the policy fails amid requests, and nobody notices but the log."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.live.server import scrape

FAULTS = Path(__file__).parents[1] / "faults"


async def agent(client, number: int, turns: int) -> list[list[int]]:
    """A session whose prompt grows by its answers; what was generated."""
    prompt = [(number * 31 + i) % 400 + 20 for i in range(320)]
    generated = []
    for _ in range(turns):
        headers = {"X-Session-ID": f"agent-{number}"}
        generated.append(await client.generate(prompt, 12, headers=headers))
        prompt = [*prompt, *generated[-1], *(number + i for i in range(40))]
    return generated


async def agents(client, turns: int = 5) -> list[list[list[int]]]:
    return await asyncio.gather(*(agent(client, number, turns) for number in range(12)))


@pytest.mark.switch("SAGA_TEST_FAULTS", "starts a server for each fault, half a minute each")
@pytest.mark.parametrize(
    "fault", ["on_arrival:20", "on_step:50", "on_finish:10", "is_held:20", "keep_ranks:3"]
)
async def test_a_server_whose_policy_fails_goes_on_serving(fault, serve):
    path = f"{FAULTS}:{Path(__file__).parents[2]}"
    env = {"PYTHONPATH": path, "SAGA_FAULT": fault}
    async with serve("stock", blocks=100) as client:
        expected = await agents(client)
    async with serve("faulty_scheduler.FaultyScheduler", blocks=100, env=env) as client:
        assert await agents(client) == expected
        log = client.log()
        assert log.count("the policy failed") == 1 and "under_pressure.Fault" in log
        assert await agents(client) == expected
        metrics = await scrape(client.http, client.server.url)
        assert metrics["vllm:saga_policy_failures_total"] == 1.0
        assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0.0
        async with client.http.get(f"{client.server.url}/health") as answer:
            assert answer.status == 200
