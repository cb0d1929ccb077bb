"""Workflow-aware LRU and the tool-aware time to live, as the SAGA paper has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_saga.policy.retention.base import Retention
from vllm_saga.policy.workflow import Context

#: Weights of recency, reuse and size (Eq 1).
ALPHA, BETA, GAMMA = 0.3, 0.5, 0.2
#: Share of the KV pool in use at which memory pressure begins, and at which it is full (Eq 6).
PRESSURE_LOW, PRESSURE_HIGH = 0.7, 0.9
#: Percentile of a tool's latencies that a context outlasts, and the longest time to live, seconds.
TTL_PERCENTILE, TTL_MAX_S = 0.95, 300.0


def eviction_score(recency: float, reuse: float, size: float) -> float:
    """Eqs 1 and 5: the largest dies first. 0 to 1 each; age and size as shares of the largest."""
    return ALPHA * recency + BETA * (1.0 - reuse) + GAMMA * size


def memory_pressure(used_fraction: float) -> float:
    """Eq 6: 0 to 1."""
    share = (used_fraction - PRESSURE_LOW) / (PRESSURE_HIGH - PRESSURE_LOW)
    return min(1.0, max(0.0, share))


def time_to_live_s(percentile_s: float, used_fraction: float) -> float:
    """Algorithm 1: seconds a context outlives its call, of the percentile of its tool's gaps."""
    return min(percentile_s * (1.0 - 0.5 * memory_pressure(used_fraction)), TTL_MAX_S)


class WorkflowAwareLRU(Retention):
    """WA-LRU (arXiv 2605.00528, Eqs 1-6), with an unexpired time to live as a protected class.

    Args:
        used_fraction: share of the KV pool in use.
    """

    def __init__(self, used_fraction: Callable[[], float]) -> None:
        self._used_fraction = used_fraction
        self._oldest_s = self._largest = 1.0

    def prepare(self, contexts: Sequence[Context], now: float) -> None:
        live = [context for context in contexts if not context.dead]
        self._oldest_s = max((now - context.idle_since for context in live), default=1.0)
        self._largest = max((float(context.tokens) for context in live), default=1.0)

    def worth(self, context: Context, now: float) -> float:
        workflow = context.session.workflow
        reuse = workflow.agent.p_reuse(workflow.tool, context.tokens)
        recency = (now - context.idle_since) / max(self._oldest_s, 1.0)
        return -eviction_score(recency, reuse, context.tokens / max(self._largest, 1.0))

    def on_rest(self, context: Context, now: float) -> None:
        workflow = context.session.workflow
        percentile_s = workflow.agent.gaps_after(workflow.tool).quantile_s(TTL_PERCENTILE)
        context.protected_until = now + time_to_live_s(percentile_s, self._used_fraction())
