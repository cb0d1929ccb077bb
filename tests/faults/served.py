"""/v1/saga of a server whose engine is a real scheduler; what goes between them is plain values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
from fastapi import FastAPI
from vllm.v1.engine.core import EngineCore

from vllm_saga.engine import control
from vllm_saga.server.endpoints import SagaEndpoints


class Core:
    """`engine_core` of vLLM's client."""

    def __init__(self, scheduler: Any) -> None:
        control.install()
        self._core = SimpleNamespace(scheduler=scheduler)

    async def call_utility_all_async(self, method: str, op: str, payload: dict[str, Any]):
        answer = getattr(EngineCore, method)(self._core, op, payload)
        return [msgspec.msgpack.decode(msgspec.msgpack.encode(answer))]


async def app_of(scheduler: Any) -> FastAPI:
    app, plugin = FastAPI(), SagaEndpoints()
    plugin.attach_router(app)
    state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=None))
    await plugin.init_state(SimpleNamespace(engine_core=Core(scheduler)), state, None)
    return app
