"""The numbered formulas of the SAGA paper (arXiv 2605.00528), with its constants.

Those that our own policy offers as well, WA-LRU and its time to live, are in
`policy/retention/wa_lru.py`; Eq 4 is in `policy/graph.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_saga.policy.retention.wa_lru import TTL_PERCENTILE, time_to_live_s

#: A successor counts if it followed at least so often, in an agent type seen so many times.
CONFIDENCE, COLD_START = 0.7, 30
#: Chance that a step of a linear graph is the last.
P_TERM = 0.05
#: A task's deadline, in expected completion times.
SLO_FACTOR = 1.5


def ttl_s(latencies: Sequence[float], used_fraction: float) -> float:
    """Algorithm 1: seconds a context outlives its call. latencies: a tool's history, ascending."""
    if not latencies:
        return 0.0
    # Nearest rank: the paper asks for the empirical percentile and does not interpolate.
    rank = math.ceil(TTL_PERCENTILE * len(latencies))
    return time_to_live_s(latencies[rank - 1], used_fraction)


def urgency(remaining_s: float, slack_s: float) -> float:
    """One task's term of Eq 8: work left over time left, both in seconds."""
    return remaining_s / slack_s
