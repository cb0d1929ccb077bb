"""Questions to a scheduler as vLLM's client brings them to it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import msgspec
from vllm.v1.engine.core import EngineCore

from vllm_saga.engine import control


def through_core(scheduler: Any, op: str, payload: Mapping[str, Any]) -> Any:
    """Asked through the engine core, and answered in plain values only."""
    control.install()
    core = SimpleNamespace(scheduler=scheduler)
    if hasattr(EngineCore, "scheduler_rpc"):  # with patches/
        answer = EngineCore.scheduler_rpc(core, control.METHOD, (op, payload))
    else:
        answer = EngineCore.saga_control(core, op, payload)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(answer))
