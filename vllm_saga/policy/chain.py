"""Chains of KV block hashes: what a context is made of, as far as the policy can see."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

Chain = Sequence[Hashable]
"""Hashes of a context's full KV blocks, first to last; each one stands for its whole prefix."""


def common_prefix(a: Chain, b: Chain) -> int:
    """Number of leading hashes two chains share; O(log n), because hashes are chained."""
    low, high = 0, min(len(a), len(b))
    if high and a[high - 1] == b[high - 1]:
        return high
    while low < high:
        middle = (low + high) // 2
        if a[middle] == b[middle]:
            low = middle + 1
        else:
            high = middle
    return low
