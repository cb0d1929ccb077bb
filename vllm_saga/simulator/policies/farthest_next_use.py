"""Offline reference: evict what will be used again latest, knowing the trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from vllm_saga.policy.retention import DEAD, KeepRank
from vllm_saga.simulator import trace
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.lookahead import Lookahead
from vllm_saga.simulator.policies.ranked import RankedAsyncScheduler, RankedPolicy, RankedScheduler
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread


class KeepsReusable:
    """When a call ends, its owner keeps only the front that a later call will ask for."""

    reusable_blocks: Callable[[str], int]
    owners: dict[str, Any]
    free_queue: Any
    kv_cache_manager: Any

    def _free_request_blocks(self, request: Any) -> Any:
        owner = self.owners.get(request.request_id)
        groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
        blocks = list(itertools.chain.from_iterable(groups))
        result = super()._free_request_blocks(request)  # type: ignore[misc]
        if owner is not None and blocks and request.is_finished():
            self.free_queue.claim(blocks[: self.reusable_blocks(request.request_id)], owner)
        return result


class _Synchronous(KeepsReusable, RankedScheduler):
    """Over stock's synchronous scheduler."""


class _Asynchronous(KeepsReusable, RankedAsyncScheduler):
    """Over stock's asynchronous scheduler."""


class Reuse:
    """Which calls of a session will find something in the context that another call left.

    users[i]: later calls that extend the context of call i, or an older one that it has the front
    in common with; those that only extend such a user are left out, as they come after it.
    tokens[i]: how much of the context of call i is ever asked for again.
    """

    def __init__(self, session: trace.Session, block_size: int) -> None:
        self._calls, self._parents, self._block_size = session.calls, session.parents, block_size
        self.users: list[list[int]] = [[] for _ in session.calls]
        self.tokens = [0] * len(session.calls)
        for index, parent in enumerate(session.parents):
            if parent is None:
                continue
            for earlier in range(parent, index):
                common = min(self._inherited(index), self._common(earlier, parent))
                if common >= block_size:
                    self.users[earlier].append(index)
                    self.tokens[earlier] = max(self.tokens[earlier], common)

    def _inherited(self, index: int) -> int:
        """Tokens that a call takes over from its parent's context."""
        parent = self._parents[index]
        if parent is None:
            return 0
        return min(self._calls[index].reusable_tokens, self._calls[parent].context_tokens)

    def _common(self, one: int, other: int) -> int:
        """Tokens at the front that the contexts of two calls have in common, roughly from a block.

        The later of the two is replaced by its parent until both are the same.
        """
        tokens = min(self._calls[one].context_tokens, self._calls[other].context_tokens)
        while one != other and tokens >= self._block_size:
            later = max(one, other)
            parent = self._parents[later]
            if parent is None:
                return 0
            tokens = min(tokens, self._inherited(later))
            one, other = min(one, other), parent
        return tokens


class FarthestNextUse(RankedPolicy):
    """Evicts what is never used again first, then what is used again farthest ahead.

    Source: Belady 1966 (MIN), over whole contexts. A reference for eviction only: it reads the
    trace ahead, and admits, orders and places calls exactly as stock vLLM does.

    When a context is used next: at once if a call that extends it waits in the engine (of these,
    the one issued last goes first); after the gap the trace records, counted from the real end of
    the call before, if nothing else is missing; else at the earliest moment at which the calls
    still to come before it can have ended, if each takes its recorded (or estimated) model time
    and no call waits. Calls that edit their context find only the common front of it: the rest
    is given up when the call that left it ends.

    Where it falls short of an optimum:

    * MIN is optimal for blocks of equal cost and a fixed sequence of uses. Here the sequence
      depends on what was evicted, and a missing block makes all behind it useless; the tail of a
      context goes before its front, which is the right order within it.
    * One moment per context: if several calls will use different lengths of it, the first counts.
    * Prefixes that several live contexts share are kept (`RetentionQueue`); what only sessions yet
      to come will share is not.
    * With a placement that does not keep sessions on one engine, the next use may be elsewhere.
    """

    def __init__(self, cluster: ClusterView) -> None:
        super().__init__(cluster)
        self._block_size = cluster.hardware.block_size
        self._reuse: dict[LiveSession, Reuse] = {}
        self._calls: dict[str, LiveCall] = {}
        self._next_use = Lookahead(self._next_use_s)

    def scheduler_class(self, overlapping: bool) -> type:
        return _Asynchronous if overlapping else _Synchronous

    def attach(self, replica: int, scheduler: Any) -> None:
        super().attach(replica, scheduler)
        scheduler.reusable_blocks = self._reusable_blocks

    def keep_rank(self, thread: Thread) -> KeepRank:
        call = thread.call
        if call is not None and call.cached_tokens >= 0:
            return (3, -call.issued_s)
        when = self._next_use.of(thread)
        if math.isinf(when):
            return DEAD
        # An estimate may have passed: a call that was to end before is still running.
        return (3, -when if call is not None else -max(when, self.cluster.now()))

    def on_submit(self, call: LiveCall) -> None:
        super().on_submit(call)
        session = call.session
        self._calls[call.id] = call
        if session not in self._reuse:
            self._reuse[session] = Reuse(session.trace, self._block_size)
        self._next_use.changed(session)

    def on_finish(self, call: LiveCall) -> None:
        super().on_finish(call)
        del self._calls[call.id]
        self._next_use.changed(call.session)

    def on_session_end(self, session: LiveSession) -> None:
        super().on_session_end(session)
        del self._reuse[session]
        self._next_use.forget(session)

    def _reusable_blocks(self, call_id: str) -> int:
        call = self._calls[call_id]
        return self._reuse[call.session].tokens[call.index] // self._block_size

    def _next_use_s(self, thread: Thread, first_open: int) -> float:
        """The moment the context of a thread is used next; infinity: never."""
        session, last = thread.session, thread.last
        if last is None:
            return math.inf
        users = [
            index
            for index in self._reuse[session].users[last.index]
            if (call := session.calls[index]) is None or call.cached_tokens < 0
        ]
        if not users:
            return math.inf
        issues = _earliest_issues(session, first_open, users[-1])
        return min(issues[index] for index in users)


def _earliest_issues(session: LiveSession, first: int, last: int) -> dict[int, float]:
    """When the unfinished calls from `first` to `last` are issued if none has to wait."""
    described = session.trace
    issues: dict[int, float] = {}
    ends: dict[int, float] = {}
    for index in range(first, last + 1):
        call = session.calls[index]
        if call is not None:
            issues[index] = call.issued_s
        else:
            ready = max((_end_s(session, dep, ends) for dep in described.deps[index]), default=0.0)
            issues[index] = ready + described.delays_s[index]
        ends[index] = issues[index] + described.calls[index].model_s
    return issues


def _end_s(session: LiveSession, index: int, estimates: dict[int, float]) -> float:
    call = session.calls[index]
    if call is not None and call.finished_s is not None:
        return call.finished_s
    return estimates[index]
