"""A fixed limit on how many sessions may be under way: the arm that papers leave out."""

from __future__ import annotations

from collections import deque

from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.records import LiveCall, LiveSession


class StaticCap(Policy):
    """At most `per_replica` x replicas sessions are admitted, first come first served.

    A session keeps its place from its first call to its end (it is told of the end, which a real
    gateway would have to guess). The best cap is found by search over whole runs
    (`static-cap:auto`), which no operator can do for traffic to come: an upper bound.
    """

    def __init__(self, cluster: ClusterView, per_replica: int) -> None:
        super().__init__(cluster)
        self._limit = per_replica * cluster.replicas
        self._admitted: set[str] = set()
        self._queue: deque[LiveCall] = deque()

    def admit(self, call: LiveCall) -> bool:
        if call.session.id in self._admitted:
            return True
        if len(self._admitted) < self._limit:
            self._admitted.add(call.session.id)
            return True
        self._queue.append(call)
        return False

    def on_session_end(self, session: LiveSession) -> None:
        self._admitted.discard(session.id)
        while self._queue and (
            len(self._admitted) < self._limit or self._queue[0].session.id in self._admitted
        ):
            call = self._queue.popleft()
            self._admitted.add(call.session.id)
            self.cluster.submit(call)
