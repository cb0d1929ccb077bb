"""This project's scheduler, as it is installed: every engine runs the real SagaScheduler."""

from __future__ import annotations

from vllm_saga.engine.scheduler import SagaAsyncScheduler, SagaSyncScheduler
from vllm_saga.simulator.policies.base import Policy


class Saga(Policy):
    """Requests carry their session id and nothing else: no hints, no ends, no tool names."""

    sends_session_id = True

    def scheduler_class(self, overlapping: bool) -> type:
        return SagaAsyncScheduler if overlapping else SagaSyncScheduler


class SagaLineage(Saga):
    """The same without session ids: workflows are recognised by their content."""

    sends_session_id = False
