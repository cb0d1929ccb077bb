"""Retention by recency alone."""

from __future__ import annotations

from vllm_saga.policy.retention.base import Retention
from vllm_saga.policy.workflow import Context


class LeastRecentlyUsed(Retention):
    """The context that was used last is kept longest."""

    def worth(self, context: Context, now: float) -> float:
        return context.idle_since
