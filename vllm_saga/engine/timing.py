"""How long engine steps take, seen from the scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from vllm_saga.policy.cost import CostModel, Step

# Steps that only decode are alike: one in so many seconds is looked at.
_DECODE_EVERY_S = 0.25


class StepTimer:
    """Tells the cost model what the engine's steps computed and how long they took.

    A step lasts from its scheduling, or from the end of the step before if that was later (vLLM
    schedules ahead), until its output comes back.
    """

    def __init__(self) -> None:
        self._begun: deque[tuple[Any, float, Step | None]] = deque()
        self._ended_at = 0.0
        self._decode_seen_at = 0.0

    def scheduled(self, output: Any, requests: Mapping[str, Any], now: float) -> None:
        """The scheduler has made `output` (vllm/v1/core/sched/output.py)."""
        if output.total_num_scheduled_tokens:
            self._begun.append((output, now, self._step(output, requests, now)))

    def finished(self, output: Any, now: float, cost: CostModel) -> None:
        """The model has computed `output`; outputs come back in order."""
        ended_at, self._ended_at = self._ended_at, now
        if not any(begun is output for begun, _, _ in self._begun):
            return
        begun, since, step = self._begun.popleft()
        while begun is not output:
            begun, since, step = self._begun.popleft()
        if ended_at:
            cost.observe_idle(since - ended_at)
        if step is None:
            return
        seconds = now - max(since, ended_at)
        stands_for = seconds
        if step.new == len(output.num_scheduled_tokens):
            stands_for = max(now - max(self._decode_seen_at, ended_at - _DECODE_EVERY_S), seconds)
            self._decode_seen_at = now
        cost.observe(step, seconds, stands_for)

    def _step(self, output: Any, requests: Mapping[str, Any], now: float) -> Step | None:
        scheduled = output.num_scheduled_tokens
        only_decodes = output.total_num_scheduled_tokens == len(scheduled)
        if only_decodes and now - self._decode_seen_at < _DECODE_EVERY_S:
            return None
        new = pairs = kv = 0
        for request_id, count in scheduled.items():
            # vLLM counts tokens as computed once they are scheduled.
            after = requests[request_id].num_computed_tokens
            new += count
            kv += after
            pairs += count * after - count * (count - 1) // 2
        return Step(new, pairs, kv)
