"""/v1/saga of a server whose engine is a real scheduler; what goes between them is plain values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from core_calls import through_core
from fastapi import FastAPI

from vllm_saga.server.endpoints import SagaEndpoints


class Core:
    """`engine_core` of vLLM's client."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    async def call_utility_all_async(self, method: str, op: str, payload: dict[str, Any]):
        return [through_core(self._scheduler, op, payload)]


async def app_of(scheduler: Any) -> FastAPI:
    app, plugin = FastAPI(), SagaEndpoints()
    plugin.attach_router(app)
    state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=None))
    await plugin.init_state(SimpleNamespace(engine_core=Core(scheduler)), state, None)
    return app
