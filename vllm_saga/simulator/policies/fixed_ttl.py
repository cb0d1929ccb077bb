"""Keep every context for a fixed time after its call: what an operator can set without a model."""

from __future__ import annotations

from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.continuum import Continuum
from vllm_saga.simulator.records import LiveCall


class FixedTTL(Continuum):
    """A context is kept for `ttl_s` seconds after its call ended; then it is plain LRU.

    Source: the public preview of Continuum (arXiv 2511.02230), which pins for a constant 2 s, and
    the cache lifetimes that providers sell (5 min, 1 h). Kept means pinned, and queue order and
    the end of pins under need are those of `Continuum`: only its estimate of τ is replaced by the
    constant, after every call whatever follows it.

    A fixed time that only orders eviction (kept contexts last, LRU among the rest) would be LRU by
    another name: those within their time are always the ones used last. What a fixed time adds is
    that new calls wait for it, and that calls whose context is kept go first; with order of arrival
    instead, tasks took 1.6 to 3 times as long here.

    Deviations: those of `Continuum`; and the preview does not pin after tools that take longer than
    2 s on average, where this pins always.
    """

    def __init__(self, cluster: ClusterView, ttl_s: float) -> None:
        super().__init__(cluster)
        self._ttl_s = ttl_s

    def ttl_s(self, call: LiveCall) -> float:
        return self._ttl_s
