"""Session affinity and randomised work stealing between the engines of the SAGA paper."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.records import LiveCall, LiveSession

#: Load of the home engine up to which a session stays there.
AFFINITY_LOAD = 0.8
#: Loads this far apart count as imbalance.
LOAD_RATIO = 2.0
#: Seconds a session's KV takes to another engine, on average.
MIGRATION_S = 0.23
#: Steals begun per epoch.
MOST_STEALS = 4
#: Weight of a waiting call in an engine's load, for routing and for stealing.
ROUTING_QUEUE, STEALING_QUEUE = 0.01, 0.05


@dataclass(frozen=True, slots=True)
class _Move:
    """A session's KV on its way to another engine."""

    session: LiveSession
    to: int
    due_s: float


class Balancer:
    """Which engine a session's calls go to, and which sessions move.

    used_fraction: share of an engine's KV pool in use. Schedulers are handed in by `attach`.
    """

    def __init__(self, cluster: ClusterView, used_fraction: Callable[[int], float]) -> None:
        self._cluster = cluster
        self._used_fraction = used_fraction
        self._schedulers: dict[int, Any] = {}
        self._homes: dict[LiveSession, int] = {}
        self._pending: dict[str, LiveCall] = {}
        self._moves: list[_Move] = []
        self._was_empty = [False] * cluster.replicas
        self._rng = random.Random("saga-paper/steal")

    def attach(self, replica: int, scheduler: Any) -> None:
        self._schedulers[replica] = scheduler

    def submitted(self, call: LiveCall) -> None:
        self._pending[call.id] = call

    def finished(self, call: LiveCall) -> None:
        self._pending.pop(call.id, None)

    def forget(self, session: LiveSession) -> None:
        self._homes.pop(session, None)

    def route(self, call: LiveCall, is_cached: Callable[[LiveSession, int], bool]) -> int:
        """The session's home while that is not overloaded and has its KV, else the least loaded."""
        home = self._homes.get(call.session)
        loads = self._loads(ROUTING_QUEUE)
        if home is None or loads[home] >= AFFINITY_LOAD or not is_cached(call.session, home):
            # Of equally loaded engines the home.
            home = min(range(len(loads)), key=lambda r: (loads[r], r != home))
            self._homes[call.session] = home
        return home

    def balance(self) -> list[tuple[LiveCall, int]]:
        """One epoch: begins steals, and says which calls are to go where now."""
        self._pending = {k: c for k, c in self._pending.items() if c.cached_tokens < 0}
        arrived = self._arrived()
        empty = [not self._counts(replica)[1] for replica in range(self._cluster.replicas)]
        # Empty now and an epoch (100 ms) ago.
        idle = [r for r, now in enumerate(empty) if now and self._was_empty[r]]
        self._was_empty = empty
        loads = self._loads(STEALING_QUEUE)
        least = min(loads)
        overloaded = [r for r, load in enumerate(loads) if load > LOAD_RATIO * least]
        for thief in (idle or [loads.index(least)])[:MOST_STEALS]:
            victims = [r for r in overloaded if r != thief]
            if victims:
                self._steal(self._rng.choice(victims), thief)
        return arrived

    # -- inside ---------------------------------------------------------------------------------

    def _counts(self, replica: int) -> tuple[int, int]:
        running, waiting = self._schedulers[replica].get_request_counts()
        return running, waiting

    def _loads(self, per_waiting: float) -> list[float]:
        """Half the batch in use + half the memory in use + so much for every waiting call."""
        loads = []
        for replica in range(self._cluster.replicas):
            running, waiting = self._counts(replica)
            busy = running / self._cluster.hardware.max_num_seqs
            memory = self._used_fraction(replica)
            loads.append(0.5 * busy + 0.5 * memory + per_waiting * waiting)
        return loads

    def _steal(self, victim: int, thief: int) -> None:
        """Begin to move the victim's oldest pending session."""
        moving = {move.session for move in self._moves}
        for call in self._pending.values():
            session = call.session
            if call.replica == victim and session not in moving and not _has_begun(session):
                due = self._cluster.now() + MIGRATION_S
                self._moves.append(_Move(session, thief, due))
                return

    def _arrived(self) -> list[tuple[LiveCall, int]]:
        """Pending calls of the sessions whose KV has arrived, unless the victim began one."""
        now = self._cluster.now()
        due = [move for move in self._moves if move.due_s <= now]
        self._moves = [move for move in self._moves if move.due_s > now]
        calls = []
        for move in due:
            waiting = [c for c in self._pending.values() if c.session is move.session]
            if waiting and not _has_begun(move.session):
                self._homes[move.session] = move.to
                calls += [(call, move.to) for call in waiting if call.replica != move.to]
        return calls


def _has_begun(session: LiveSession) -> bool:
    """Whether an engine works on one of its calls."""
    return any(
        thread.call is not None and thread.call.cached_tokens >= 0
        for thread in session.threads.values()
    )


def copy_prefix(call_id: str, source: Any, target: Any, owner: Any) -> None:
    """Put the cached front of a call's prompt into the pool of the engine that now has the call.

    source, target: schedulers with a ranked free queue. The copied blocks stay free, as all cached
    blocks do, and are owned by `owner`.
    """
    request = target.requests[call_id]
    here, there = target.kv_cache_manager.block_pool, source.kv_cache_manager.block_pool
    present = _cached_front(here, request.block_hashes)
    wanted = len(_cached_front(there, request.block_hashes))
    here.touch(present)
    room = max(min(wanted - len(present), here.get_num_free_blocks()), 0)
    blocks = present + here.get_new_blocks(room)
    here.cache_full_blocks(request, blocks, len(present), len(blocks), target.block_size, 0)
    target.free_queue.claim(blocks, owner)
    here.free_blocks(reversed(blocks))


def _cached_front(pool: Any, hashes: Any) -> list[Any]:
    """The cached blocks for the longest run of hashes from the first."""
    blocks: list[Any] = []
    for block_hash in hashes:
        found = pool.get_cached_block(block_hash, [0])
        if not found:
            break
        blocks += found
    return blocks
