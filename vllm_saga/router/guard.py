"""A placer that may fail: a bug in placement costs affinity, never a call (invariant 4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

from vllm_saga.router.fleet import Arrival, Decision, EngineReport, Move, Placer, SessionKey

logger = logging.getLogger(__name__)

FALLBACK = "fallback"


class GuardedPlacer:
    """Logs a placer's first exception, counts them all, and then sends calls where fewest are."""

    def __init__(self, placer: Placer, in_flight: Callable[[str], int]) -> None:
        self._placer = placer
        self._in_flight = in_flight
        self._accepting: dict[str, bool] = {}
        self._draining: set[str] = set()
        self.errors = 0

    def add(self, replica: str) -> None:
        self._accepting[replica] = True
        with self._guard():
            self._placer.add(replica)

    def remove(self, replica: str) -> None:
        self._accepting.pop(replica, None)
        self._draining.discard(replica)
        with self._guard():
            self._placer.remove(replica)

    def set_accepting(self, replica: str, accepting: bool) -> None:
        self._accepting[replica] = accepting
        with self._guard():
            self._placer.set_accepting(replica, accepting)

    def set_draining(self, replica: str, draining: bool) -> None:
        (self._draining.add if draining else self._draining.discard)(replica)
        with self._guard():
            self._placer.set_draining(replica, draining)

    def place(self, arrival: Arrival, now: float, exclude: Collection[str] = ()) -> Decision | None:
        decision = None
        with self._guard() as guard:
            decision = self._placer.place(arrival, now, exclude)
        if not guard.failed:
            return decision
        able = [name for name, open_ in self._accepting.items() if open_ and name not in exclude]
        able = [name for name in able if name not in self._draining] or able
        return Decision(min(able, key=self._in_flight), FALLBACK) if able else None

    def on_first_byte(self, call_id: str, now: float) -> None:
        with self._guard():
            self._placer.on_first_byte(call_id, now)

    def on_finish(self, call_id: str, now: float, total_tokens: int | None) -> None:
        with self._guard():
            self._placer.on_finish(call_id, now, total_tokens)

    def on_report(self, replica: str, report: EngineReport) -> None:
        with self._guard():
            self._placer.on_report(replica, report)

    def end(self, session: SessionKey) -> None:
        with self._guard():
            self._placer.end(session)

    def epoch(self, now: float) -> Sequence[Move]:
        with self._guard():
            return self._placer.epoch(now)
        return ()

    def _guard(self) -> _Guard:
        return _Guard(self)


class _Guard:
    """Swallows exceptions, but not what ends the process or a task."""

    def __init__(self, owner: GuardedPlacer) -> None:
        self._owner = owner
        self.failed = False

    def __enter__(self) -> _Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        self.failed = True
        self._owner.errors += 1
        if self._owner.errors == 1:
            logger.exception("a bug in placement: going on without it; later ones are only counted")
        return True
