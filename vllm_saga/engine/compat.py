"""The contract with vLLM: what the adapter relies on, checked before it is relied on."""

from __future__ import annotations

import inspect
from numbers import Real
from typing import Any

import vllm
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

#: What `scripts/test --matrix` passes with.
TESTED_VERSIONS = "0.28 to 0.33"

_METHODS: dict[type, dict[str, tuple[str, ...]]] = {
    Scheduler: {
        "schedule": (),
        "update_from_output": ("scheduler_output",),
        "add_request": ("request",),
        "_free_request": ("request",),
        "_free_request_blocks": ("request",),
        "reset_prefix_cache": ("reset_running_requests", "reset_connector"),
        "get_request_counts": (),
        "make_stats": (),
        "shutdown": (),
    },
    RequestQueue: {
        "add_request": ("request",),
        "pop_request": (),
        "peek_request": (),
        "prepend_request": ("request",),
        "prepend_requests": ("requests",),
        "remove_request": ("request",),
        "remove_requests": ("requests",),
    },
    FreeKVCacheBlockQueue: {
        "popleft": (),
        "popleft_n": ("n",),
        "remove": ("block",),
        "append": ("block",),
        "append_n": ("blocks",),
        "prepend_n": ("blocks",),
        "get_all_free_blocks": (),
    },
    BlockPool: {"get_num_free_blocks": (), "free_blocks": ("ordered_blocks",)},
    KVCacheManager: {"get_blocks": ("request_id",)},
    Request: {"is_finished": ()},
}

#: The hooks of patches/ that this vLLM's scheduler has: vLLM calls them, and we do nothing in their
#: place.
HOOKS = frozenset(
    name
    for name in (
        "_create_waiting_queue",
        "_create_free_block_queue",
        "_select_preemption_victim",
        "on_request_finished",
    )
    if hasattr(Scheduler, name)
)

_REQUEST_ARGUMENTS = ("request_id", "prompt_token_ids", "cache_salt", "priority", "block_hasher")


class UnsupportedVllmError(RuntimeError):
    """This vLLM lacks something the adapter needs; the message names it."""


def check_classes() -> None:
    """Check methods and their leading parameters.

    Raises:
        UnsupportedVllmError: naming everything that is missing, and what to do.
    """
    missing = []
    for cls, methods in _METHODS.items():
        for name, parameters in methods.items():
            method = getattr(cls, name, None)
            if method is None:
                missing.append(f"{cls.__name__}.{name}()")
                continue
            found = tuple(inspect.signature(method).parameters)[1:]
            if found[: len(parameters)] != parameters:
                expected = ", ".join(parameters)
                missing.append(f"{cls.__name__}.{name}({expected}), found ({', '.join(found)})")
    arguments = inspect.signature(Request.__init__).parameters
    missing += [f"Request({name}=)" for name in _REQUEST_ARGUMENTS if name not in arguments]
    _refuse(missing)


def check_instance(scheduler: Any) -> None:
    """Check the attributes of a constructed scheduler that the adapter swaps or reads.

    Raises:
        UnsupportedVllmError: as `check_classes`.
    """
    missing = []
    for path, expected in {
        "waiting": RequestQueue,
        "running": list,
        "requests": dict,
        "policy": object,
        "cache_config": object,
        "hash_block_size": int,
        "kv_cache_config.kv_cache_groups": list,
        "kv_cache_manager.usage": Real,
        "kv_cache_manager.block_pool": BlockPool,
        "kv_cache_manager.block_pool.free_block_queue": FreeKVCacheBlockQueue,
        "kv_cache_manager.block_pool.num_gpu_blocks": int,
    }.items():
        found = scheduler
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is None or not isinstance(found, expected):
            missing.append(f"Scheduler.{path} of type {expected.__name__}")
    _refuse(missing)


def _refuse(missing: list[str]) -> None:
    if missing:
        raise UnsupportedVllmError(
            f"vllm-saga does not fit vLLM {vllm.__version__}: missing {'; '.join(missing)}. "
            f"It is tested with vLLM {TESTED_VERSIONS}. Use one of these, upgrade vllm-saga, "
            "or start without --scheduler-cls saga."
        )
