"""The numbered formulas of the SAGA paper (arXiv 2605.00528), with its constants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

#: Weights of WA-LRU: recency, reuse, size (Eq 1).
ALPHA, BETA, GAMMA = 0.3, 0.5, 0.2
#: Share of the KV pool in use at which memory pressure begins, and at which it is full (Eq 6).
PRESSURE_LOW, PRESSURE_HIGH = 0.7, 0.9
#: Percentile of a tool's latencies that a context outlasts, and the longest time to live, seconds.
TTL_PERCENTILE, TTL_MAX_S = 0.95, 300.0
#: A successor counts if it followed at least so often, in an agent type seen so many times.
CONFIDENCE, COLD_START = 0.7, 30
#: Chance that a step of a linear graph is the last.
P_TERM = 0.05
#: A task's deadline, in expected completion times.
SLO_FACTOR = 1.5


def reuse_probability(cached_tokens: float, successors: Iterable[tuple[float, float]]) -> float:
    """Eq 4: chance-weighted share of the next prompt that is cached already, 0 to 1.

    successors: (probability, expected new tokens) of each step that may follow.
    """
    if cached_tokens <= 0:
        return 0.0
    expected = sum(p * cached_tokens / (cached_tokens + new) for p, new in successors)
    return min(1.0, max(0.0, expected))


def eviction_score(recency: float, reuse: float, size: float) -> float:
    """Eqs 1 and 5: the largest dies first. 0 to 1 each; age and size as shares of the largest."""
    return ALPHA * recency + BETA * (1.0 - reuse) + GAMMA * size


def memory_pressure(used_fraction: float) -> float:
    """Eq 6: 0 to 1."""
    share = (used_fraction - PRESSURE_LOW) / (PRESSURE_HIGH - PRESSURE_LOW)
    return min(1.0, max(0.0, share))


def ttl_s(latencies: Sequence[float], used_fraction: float) -> float:
    """Algorithm 1: seconds a context outlives its call. latencies: a tool's history, ascending."""
    if not latencies:
        return 0.0
    # Nearest rank: the paper asks for the empirical percentile and does not interpolate.
    longest = latencies[math.ceil(TTL_PERCENTILE * len(latencies)) - 1]
    return min(longest * (1.0 - 0.5 * memory_pressure(used_fraction)), TTL_MAX_S)


def urgency(remaining_s: float, slack_s: float) -> float:
    """One task's term of Eq 8: work left over time left, both in seconds."""
    return remaining_s / slack_s
