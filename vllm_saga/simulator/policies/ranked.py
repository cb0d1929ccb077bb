"""For policies that say which cached context dies first: engines that evict by their rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_saga.engine.blocks import RetentionQueue
from vllm_saga.policy.retention import DEAD, KeepRank
from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread


class _Cached:
    """What one thread has cached on one engine: an owner for `RetentionQueue`."""

    __slots__ = ("dead", "thread")

    def __init__(self, thread: Thread) -> None:
        self.thread = thread
        self.dead = False


class RankedMixin:
    """Tells the free queue whose blocks are freed; everything else is stock's."""

    owners: dict[str, _Cached]
    free_queue: RetentionQueue
    kv_cache_manager: Any

    def _free_request_blocks(self, request: Any) -> Any:
        owner = self.owners.get(request.request_id)
        groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
        if owner is not None and any(groups):
            self.free_queue.claim(itertools.chain.from_iterable(groups), owner)
        return super()._free_request_blocks(request)  # type: ignore[misc]


class RankedScheduler(RankedMixin, Scheduler):
    """Stock's synchronous scheduler over a ranked free queue."""


class RankedAsyncScheduler(RankedMixin, AsyncScheduler):
    """Stock's asynchronous scheduler over a ranked free queue."""


class RankedPolicy(Policy):
    """Evicts the cached context with the smallest `keep_rank` first, tail first within it.

    Ranks are tuples `(class, value)`: dead contexts are (0, …), blocks of nobody (1, …), prefixes
    shared by several live threads (5, …); between them and above there is room (2, 3, 4, 6, …).
    """

    def __init__(self, cluster: ClusterView) -> None:
        super().__init__(cluster)
        self._owners: list[dict[str, _Cached]] = [{} for _ in range(cluster.replicas)]
        self._cached: list[dict[Thread, _Cached]] = [{} for _ in range(cluster.replicas)]

    def scheduler_class(self, overlapping: bool) -> type | None:
        return RankedAsyncScheduler if overlapping else RankedScheduler

    def attach(self, replica: int, scheduler: Any) -> None:
        pool = scheduler.kv_cache_manager.block_pool
        scheduler.owners = self._owners[replica]
        scheduler.free_queue = RetentionQueue(pool.free_block_queue, self._keep_ranks)
        pool.free_block_queue = scheduler.free_queue

    def keep_rank(self, thread: Thread) -> KeepRank:
        """How much the cached context of a thread is worth keeping now."""
        raise NotImplementedError

    def before_step(self, replica: int, scheduler: Any) -> None:
        scheduler.free_queue.new_epoch()

    def on_submit(self, call: LiveCall) -> None:
        cached = self._cached[call.replica]
        if call.thread not in cached:
            cached[call.thread] = _Cached(call.thread)
        self._owners[call.replica][call.id] = cached[call.thread]

    def on_finish(self, call: LiveCall) -> None:
        self._owners[call.replica].pop(call.id, None)

    def on_session_end(self, session: LiveSession) -> None:
        for cached in self._cached:
            for thread in session.threads.values():
                owner = cached.pop(thread, None)
                if owner is not None:
                    owner.dead = True

    def _keep_ranks(self, owners: Sequence[Any]) -> Sequence[KeepRank]:
        return [DEAD if owner.dead else self.keep_rank(owner.thread) for owner in owners]
