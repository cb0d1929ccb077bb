"""A real engine in its own process, on a vLLM with patches/. Run by test_series.py."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import vllm
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_saga.engine import control

MODEL = Path(__file__).parents[2] / ".cache" / "tiny-model"


async def use(llm: AsyncLLM) -> tuple[dict, dict]:
    """Three turns of an agent, then its end: what the engine reports before and after."""
    prompt = [11, 12, 13] * 20
    for turn in range(3):
        params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
        inputs = {"prompt_token_ids": prompt}
        async for output in llm.generate(inputs, params, f"turn-{turn}", session_id="agent"):
            last = output
        prompt += list(last.outputs[0].token_ids)
        await asyncio.sleep(1.1)
    (before,) = await control.ask(llm, control.STATE, {})
    (ended,) = await control.ask(llm, control.END, {"tenant": "", "session": "agent"})
    (after,) = await control.ask(llm, control.STATE, {})
    return before, ended, after


def test_an_engine_by_our_name_with_messages_and_metrics(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert vllm.__file__.startswith(os.environ["PATCHED_VLLM"])
    args = AsyncEngineArgs(
        model=str(MODEL),
        load_format="dummy",
        enforce_eager=True,
        max_model_len=512,
        num_gpu_blocks_override=100,
        scheduler_cls="saga",
    )
    config = args.create_engine_config()
    assert config.scheduler_config.scheduler_cls == "vllm_saga.SagaScheduler"

    async def run() -> tuple[dict, dict, dict]:
        llm = AsyncLLM.from_vllm_config(config)
        try:
            return await use(llm)
        finally:
            llm.shutdown()

    before, ended, after = asyncio.run(run())
    assert before["saga"]["sessions"] == 1 and ended == {"ended": True}
    assert after["started"] == before["started"] and after["saga"]["sessions"] == 0
    labels = {"model_name": str(MODEL), "engine": "0"}
    assert REGISTRY.get_sample_value("vllm:saga_active", labels) == 1.0
