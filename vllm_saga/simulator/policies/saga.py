"""This project's scheduler, as it is installed: every engine runs the real SagaScheduler."""

from __future__ import annotations

from typing import Any

from vllm_saga.engine.scheduler import SagaAsyncScheduler, SagaSyncScheduler
from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.records import LiveCall


class Saga(Policy):
    """Requests carry their session id and nothing else: no hints, no ends.

    What tools a call invoked the engine reads from its output; here, from the trace, once the call
    has ended.
    """

    sends_session_id = True

    def __init__(self, cluster: ClusterView) -> None:
        super().__init__(cluster)
        self._calls: dict[str, LiveCall] = {}

    def attach(self, replica: int, scheduler: Any) -> None:
        scheduler._tools_of = self._tools_of

    def on_submit(self, call: LiveCall) -> None:
        self._calls[call.id] = call

    def on_finish(self, call: LiveCall) -> None:
        self._calls.pop(call.id, None)

    def acts_at(self, replica: int, scheduler: Any) -> float:
        return self.cluster.now()

    def _tools_of(self, request: Any) -> list[str] | None:
        tool = self._calls[request.request_id].spec.tool
        return tool.split("+") if tool else None

    def scheduler_class(self, overlapping: bool) -> type:
        return SagaAsyncScheduler if overlapping else SagaSyncScheduler


class SagaLineage(Saga):
    """The same without session ids: workflows are recognised by their content."""

    sends_session_id = False
