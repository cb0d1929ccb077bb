"""Keep every context for a fixed time after its call: what an operator can set without a model."""

from __future__ import annotations

from vllm_saga.policy.retention import DEAD, KeepRank
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.ranked import RankedPolicy
from vllm_saga.simulator.records import Thread


class FixedTTL(RankedPolicy):
    """A context is kept for `ttl_s` seconds after its call ended; then it is plain LRU.

    Source: the fixed 2 s pin of Continuum's public preview (arXiv 2511.02230) and the cache
    lifetimes that providers sell (5 min, 1 h). Admission, queue order and placement are stock's.

    Where such systems differ or say nothing:

    * Kept means last in the order of eviction, not pinned: if everything is within its time and a
      block is needed, the context nearest to its expiry goes. A pin would stop the engine.
    * A call that is issued in time keeps its context until it has run, however long it queues: it
      is the gap that is bridged. One that comes too late finds what LRU has left.
    * Ends of sessions and of their sub-agents are signalled, and their contexts go first.
    * A prefix that several live contexts share outlives its owners' time (`RetentionQueue`).
    """

    def __init__(self, cluster: ClusterView, ttl_s: float) -> None:
        super().__init__(cluster)
        self._ttl_s = ttl_s

    def keep_rank(self, thread: Thread) -> KeepRank:
        call, idle_since = thread.call, thread.idle_since
        if call is not None:
            begun = call.cached_tokens >= 0
            in_time = begun or call.issued_s - idle_since <= self._ttl_s
        elif thread.ended:
            return DEAD
        else:
            in_time = self.cluster.now() - idle_since <= self._ttl_s
        return (3 if in_time else 2, idle_since)
