"""What agents have left in the KV pools, and for how long it stays (SAGA paper, Algorithm 1)."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass

from vllm_saga.policy.retention.wa_lru import PRESSURE_LOW
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.records import Thread


@dataclass(eq=False, slots=True)
class Resident:
    """The context that a thread's last call left on an engine.

    own_tokens: those that other sessions do not share. reuse: Eq 4; None while the agent's type is
    not known. expires_s: end of its time to live. protected: still within it, with no next call.
    """

    thread: Thread
    replica: int
    tokens: int
    own_tokens: int
    reuse: float | None = None
    expires_s: float = 0.0
    protected: bool = False
    dropped: bool = False


class Memory:
    """The residents of all engines. `protected_tokens`: own tokens of protected ones, by engine."""

    def __init__(self, cluster: ClusterView) -> None:
        self._cluster = cluster
        self._residents: dict[Thread, Resident] = {}
        self._tokens = [0] * cluster.replicas
        self.protected_tokens = [0] * cluster.replicas
        self._order = itertools.count()
        self._by_expiry: list[tuple[float, int, Resident]] = []
        self._expired: list[deque[Resident]] = [deque() for _ in range(cluster.replicas)]

    def get(self, thread: Thread) -> Resident | None:
        return self._residents.get(thread)

    def used_fraction(self, replica: int) -> float:
        """Share of a KV pool that running calls and the residents not dropped take up."""
        running, cached = self._cluster.kv_in_use(replica)
        used = max(running, min(running + cached, self._tokens[replica]))
        return used / self._cluster.kv_tokens

    def keep(self, resident: Resident) -> None:
        """A call has ended; what its thread left before is superseded."""
        self.release(resident.thread)
        self._residents[resident.thread] = resident
        self._tokens[resident.replica] += resident.tokens
        if resident.expires_s > self._cluster.now():
            resident.protected = True
            self.protected_tokens[resident.replica] += resident.own_tokens
            heapq.heappush(self._by_expiry, (resident.expires_s, next(self._order), resident))

    def returned(self, thread: Thread, replica: int) -> None:
        """The thread's next call goes to an engine, which from now on has what it left."""
        resident = self._residents.get(thread)
        if resident is None:
            return
        self._unprotect(resident)
        if resident.replica != replica and not resident.dropped:
            self._tokens[resident.replica] -= resident.tokens
            self._tokens[replica] += resident.tokens
        resident.replica = replica

    def release(self, thread: Thread) -> None:
        """What the thread left is over."""
        resident = self._residents.pop(thread, None)
        if resident is not None:
            self._unprotect(resident)
            self._forget_tokens(resident)

    def expire(self, replica: int) -> None:
        """End times to live; drop what outlived its own, oldest first, while memory is short."""
        now = self._cluster.now()
        while self._by_expiry and self._by_expiry[0][0] <= now:
            resident = heapq.heappop(self._by_expiry)[2]
            if resident.protected:
                self._unprotect(resident)
                self._expired[resident.replica].append(resident)
        expired = self._expired[replica]
        while expired and self.used_fraction(replica) > PRESSURE_LOW:
            resident = expired.popleft()
            current = self._residents.get(resident.thread) is resident
            if current and resident.thread.call is None:
                self._forget_tokens(resident)

    @property
    def next_expiry_s(self) -> float:
        """When the next time to live may end."""
        return self._by_expiry[0][0] if self._by_expiry else math.inf

    def _unprotect(self, resident: Resident) -> None:
        if resident.protected:
            resident.protected = False
            self.protected_tokens[resident.replica] -= resident.own_tokens

    def _forget_tokens(self, resident: Resident) -> None:
        if not resident.dropped:
            resident.dropped = True
            self._tokens[resident.replica] -= resident.tokens
