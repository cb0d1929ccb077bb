"""Which cached block dies first, when stock's LRU would take one of a workflow still alive."""

from __future__ import annotations

from vllm_saga.policy.price import Price
from vllm_saga.policy.residency import Residency
from vllm_saga.policy.retention.base import DEAD, SHARED, UNOWNED, KeepRank, Retention
from vllm_saga.policy.retention.continuum import TimeToLive, TimeToLivePins
from vllm_saga.policy.retention.lru import LeastRecentlyUsed
from vllm_saga.policy.retention.value import ValueDensity
from vllm_saga.policy.retention.wa_lru import WorkflowAwareLRU

__all__ = [
    "DEAD", "SHARED", "UNOWNED", "KeepRank", "Retention", "TimeToLive", "choose",
]  # fmt: skip


def choose(name: str, residency: Residency, price: Price) -> Retention:
    """The strategy of that name; "stock" asks none. ValueError if there is no such name."""
    if name == "value":
        return ValueDensity(price)
    if name == "wa-lru":
        return WorkflowAwareLRU(lambda: residency.used_blocks / residency.capacity)
    if name == "continuum":
        return TimeToLivePins(price)
    if name in ("lru", "stock"):
        return LeastRecentlyUsed()
    raise ValueError(
        f"no retention strategy {name!r}; there are value, wa-lru, continuum, lru, stock"
    )
