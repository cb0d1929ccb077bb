"""The plain ways to choose a replica: they know neither sizes nor reports, and move nothing.

Where a policy keeps no sessions, a draining replica gets no calls at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vllm_saga.router.fleet import Arrival
from vllm_saga.router.replicas import BasePlacer, Replica, fewest_calls, open_to_new, rendezvous


class RoundRobin(BasePlacer):
    """Every call to the next replica, whatever it continues."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = itertools.count()

    def choose(
        self, arrival: Arrival, accepting: Sequence[Replica], now: float
    ) -> tuple[Replica | None, str]:
        free = open_to_new(accepting)
        return (free[next(self._turn) % len(free)] if free else None), "round_robin"


class BySession(BasePlacer):
    """Every call of a session to the replica its key hashes highest on; others by fewest calls."""

    def choose(
        self, arrival: Arrival, accepting: Sequence[Replica], now: float
    ) -> tuple[Replica | None, str]:
        free = open_to_new(accepting)
        if arrival.session is None:
            return fewest_calls(free), "least_loaded"
        return rendezvous(arrival.session, free), "session"


class LeastLoaded(BasePlacer):
    """Every call to the replica with the fewest calls in flight."""

    def choose(
        self, arrival: Arrival, accepting: Sequence[Replica], now: float
    ) -> tuple[Replica | None, str]:
        return fewest_calls(open_to_new(accepting)), "least_loaded"
