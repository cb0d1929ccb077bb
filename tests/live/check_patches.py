"""`vllm serve --scheduler-cls saga` with patches/ applied. Run by tests/patches/test_series.py."""

from __future__ import annotations

import asyncio
import os

import pytest
import vllm
from test_endpoints_live import end, get_state
from test_serve import agents

from benchmarks.live.process import ServerError
from benchmarks.live.server import scrape
from vllm_saga.engine import compat

pytestmark = pytest.mark.smoke


async def test_agents_are_served_and_the_engine_has_every_hook(serve):
    assert vllm.__file__.startswith(os.environ["PATCHED_VLLM"]) and len(compat.HOOKS) == 4
    async with serve("saga", blocks=100, env={"VLLM_PLUGINS": "saga"}) as client:
        # The engine says so: it is another process than this.
        assert f"hooks: {', '.join(sorted(compat.HOOKS))}\n" in client.log()
        answers = await agents(client, 8, 4)
        assert all(len(tokens) == 12 for turns in answers for tokens in turns)
        # These messages come by AsyncLLM.scheduler_rpc, the figures in SchedulerStats.custom_stats.
        state = await get_state(client)
        assert {name for _, name in state["sessions"]} == {f"agent-{n}" for n in range(8)}
        assert state["saga"]["holds"] > 0
        assert await end(client, "agent-3") and not await end(client, "agent-3")
        await asyncio.sleep(1.0)
        await client.generate([1, 2, 3], 2)
        metrics = await scrape(client.http, client.server.url)
        assert metrics["vllm:saga_active"] == 1 and metrics["vllm:saga_holds_total"] > 0
        assert "the policy failed" not in client.log()


async def test_a_wrong_name_is_refused_with_the_right_one(serve, tmp_path):
    with pytest.raises(ServerError):
        async with serve("sage"):
            pass
    log = (tmp_path / "sage.log").read_text()
    assert "'sage'" in log and "'saga'" in log and "Initializing a V1 LLM engine" not in log
