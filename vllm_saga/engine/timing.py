"""How long engine steps take, seen from the scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.stepfit import Step

# One step in so many seconds is looked at: the longer a kind of step takes, the more often.
_LOOK_EVERY_S = 0.1
_STANDS_FOR_S = 1.0


class StepTimer:
    """Tells the cost model what the engine's steps computed and how long they took.

    A step lasts from its scheduling, or from the end of the step before if that was later (vLLM
    schedules ahead), until its output comes back.
    """

    def __init__(self) -> None:
        self._begun: deque[tuple[Any, float, Step | None]] = deque()
        self._ended_at = 0.0
        self._looked_at = 0.0
        self._seen_until = 0.0

    def scheduled(self, output: Any, requests: Mapping[str, Any], now: float) -> None:
        """The scheduler has made `output` (vllm/v1/core/sched/output.py)."""
        if not output.total_num_scheduled_tokens:
            return
        step = None
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            step = self._step(output, requests)
        self._begun.append((output, now, step))

    def finished(self, output: Any, now: float, cost: CostModel) -> None:
        """The model has computed `output`; outputs come back in order."""
        ended_at, self._ended_at = self._ended_at, now
        if not any(begun is output for begun, _, _ in self._begun):
            return
        begun, since, step = self._begun.popleft()
        while begun is not output:
            begun, since, step = self._begun.popleft()
        if ended_at and since > ended_at:
            cost.observe_idle(since - ended_at)
            self._seen_until = since
        if step is not None:
            seconds = now - max(since, ended_at)
            unseen = min(now - self._seen_until, _STANDS_FOR_S)
            cost.observe(step, seconds, max(unseen, seconds))
            self._seen_until = now

    @staticmethod
    def _step(output: Any, requests: Mapping[str, Any]) -> Step:
        scheduled = output.num_scheduled_tokens
        new = pairs = kv = 0
        for request_id, count in scheduled.items():
            # vLLM counts tokens as computed once they are scheduled.
            after = requests[request_id].num_computed_tokens
            new += count
            kv += after
            pairs += count * after - count * (count - 1) // 2
        return Step(new, pairs, kv, len(scheduled))
