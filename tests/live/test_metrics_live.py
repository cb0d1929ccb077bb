"""The engine's metrics on vLLM's own page: of every rank, whatever API server is asked."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

PLUGINS = {"VLLM_PLUGINS": "saga", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
FLAGS = ("--data-parallel-size", "2", "--api-server-count", "2")


async def read(client) -> dict[tuple[str, str], float]:
    """(metric, engine) -> sum over its other labels."""
    async with client.http.get(f"{client.server.url}/metrics") as answer:
        text = await answer.text()
    assert not re.search(r"saga_.*task-\d", text), "a session in a label"
    totals: dict[tuple[str, str], float] = {}
    for name, labels, value in re.findall(r"^vllm:saga_(\w+)\{(.*)\} (\S+)$", text, re.M):
        if engine := re.search(r'engine="(\d+)"', labels):
            key = (name, engine[1])
            totals[key] = totals.get(key, 0.0) + float(value)
    return totals


async def state(client, rank: int) -> dict[str, int]:
    url = f"{client.server.url}/v1/saga/state"
    async with client.http.get(url, headers={"x-data-parallel-rank": str(rank)}) as answer:
        return json.loads(await answer.text())["saga"]


@pytest.mark.timeout(900)
@pytest.mark.switch("SAGA_TEST_RANKS", "minutes")
async def test_counters_of_each_rank_sum_up_over_api_servers(serve):
    async with serve("saga", *FLAGS, blocks=100, env=PLUGINS) as client:
        calls = (
            client.generate(
                [100 + n] * 1200, 60, session_id=f"task-{n}",
                headers={"x-data-parallel-rank": str(n % 2), "connection": "close"},
            )
            for n in range(12)
        )  # fmt: skip
        await asyncio.gather(*calls)
        # An engine reports with its last step.
        await asyncio.sleep(1.0)
        for _ in range(4):
            metrics = await read(client)
            for rank in range(2):
                told = await state(client, rank)
                assert metrics["holds_total", str(rank)] == told["holds"] > 0
                assert metrics["sessions", str(rank)] == told["sessions"] == 6
                assert metrics["active", str(rank)] == 1
                assert metrics["workflows", str(rank)] >= 6
