"""Offline reference: this project's schedule, with evictions that know the trace."""

from __future__ import annotations

from typing import Any

from vllm_saga.engine.scheduler import SagaAsyncScheduler, SagaSyncScheduler
from vllm_saga.simulator.policies.farthest_next_use import FarthestNextUse, KeepsReusable
from vllm_saga.simulator.policies.ranked import RankedMixin
from vllm_saga.simulator.policies.saga import Saga
from vllm_saga.simulator.records import LiveCall


class _Synchronous(KeepsReusable, RankedMixin, SagaSyncScheduler):
    """Saga's synchronous scheduler over a free queue that is told the next uses."""


class _Asynchronous(KeepsReusable, RankedMixin, SagaAsyncScheduler):
    """Saga's asynchronous scheduler over a free queue that is told the next uses."""


class SagaFarthest(Saga, FarthestNextUse):
    """Who may hold KV is decided as under saga; what dies first, as under farthest-next-use.

    No lower bound for recomputed tokens: the next use of a context whose call is held counts as at
    once, but the schedule may hold it for long, and saga's own order knows that.
    """

    def scheduler_class(self, overlapping: bool) -> type:
        return _Asynchronous if overlapping else _Synchronous

    def attach(self, replica: int, scheduler: Any) -> None:
        scheduler._free_queue = None
        Saga.attach(self, replica, scheduler)
        FarthestNextUse.attach(self, replica, scheduler)

    def on_submit(self, call: LiveCall) -> None:
        Saga.on_submit(self, call)
        FarthestNextUse.on_submit(self, call)

    def on_finish(self, call: LiveCall) -> None:
        FarthestNextUse.on_finish(self, call)
