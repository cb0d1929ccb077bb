"""Real vLLM schedulers without an engine around them: stock's, ours, or any other class."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from vllm_saga.engine.scheduler import SagaAsyncScheduler, SagaSyncScheduler

BLOCK_SIZE = 16
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 1 << 22,
    "torch_dtype": "float16",
}
_CLASSES: Mapping[tuple[str, bool], type] = {
    ("stock", False): Scheduler,
    ("stock", True): AsyncScheduler,
    ("saga", False): SagaSyncScheduler,
    ("saga", True): SagaAsyncScheduler,
}


@cache
def _model_config(max_model_len: int) -> ModelConfig:
    """Of a model without weights: a scheduler needs no more, and vLLM reads its file once."""
    with tempfile.TemporaryDirectory(prefix="saga-model-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_MODEL))
        return ModelConfig(
            model=directory, skip_tokenizer_init=True, max_model_len=max_model_len, seed=0
        )


def make_scheduler(
    kind: str | type,
    *,
    blocks: int = 1000,
    overlapping: bool = False,
    policy: str = "fcfs",
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 512,
    prefix_caching: bool = True,
    saga: Mapping[str, Any] | None = None,
    max_model_len: int = 8192,
    block_size: int = BLOCK_SIZE,
    log_stats: bool = True,
) -> Any:
    """A scheduler over `blocks` KV blocks (one of them vLLM's null block).

    kind: "stock", "saga", or a class that fits `overlapping` (vLLM's `async_scheduling`).
    saga: knobs of `SagaConfig`.
    """
    scheduler_config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        policy=policy,
        async_scheduling=overlapping,
    )
    cache_config = CacheConfig(
        block_size=block_size, enable_prefix_caching=prefix_caching, cache_dtype="auto"
    )
    vllm_config = VllmConfig(
        scheduler_config=scheduler_config,
        model_config=_model_config(max_model_len),
        cache_config=cache_config,
        additional_config={"saga": {"log_interval_s": 0, **(saga or {})}},
    )
    # VllmConfig turns it off where the platform is a CPU.
    vllm_config.scheduler_config.async_scheduling = overlapping
    register_all_kvcache_specs(vllm_config)
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.float16
    )
    cache_config.num_gpu_blocks = blocks
    kv_cache_config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    init_none_hash(sha256)
    chosen = _CLASSES[kind, overlapping] if isinstance(kind, str) else kind
    return chosen(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=block_size,
        log_stats=log_stats,
    )
