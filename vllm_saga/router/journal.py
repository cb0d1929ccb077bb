"""What people ask a router: which sessions are where, and why did that call go there?"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

from vllm_saga.router.fleet import Decision, Move, SessionKey

_DECISIONS = 1000


@dataclass(slots=True)
class _Entry:
    backend: str
    source: str
    first_seen: float
    last_seen: float
    calls: int = 0
    moves: int = 0
    total_tokens: int | None = None


class Journal:
    """The last decisions, and the sessions of late; the longest idle are forgotten first."""

    def __init__(self, max_sessions: int, session_idle: float) -> None:
        self._max_sessions = max_sessions
        self._idle = session_idle
        self._sessions: OrderedDict[SessionKey, _Entry] = OrderedDict()
        self._decisions: deque[dict[str, Any]] = deque(maxlen=_DECISIONS)

    def __len__(self) -> int:
        return len(self._sessions)

    def placed(
        self, call_id: str, session: SessionKey | None, source: str, decision: Decision, now: float
    ) -> None:
        self._note(session, decision.replica, decision.reason, call_id)
        if session is None:
            return
        entry = self._sessions.get(session)
        if entry is None:
            entry = self._sessions[session] = _Entry(decision.replica, source, now, now)
        entry.calls += 1
        entry.moves += entry.backend != decision.replica
        entry.backend, entry.last_seen = decision.replica, now
        self._sessions.move_to_end(session)
        self._expire(now)

    def moved(self, move: Move) -> None:
        for call_id in move.call_ids or (None,):
            self._note(move.session, move.target, move.reason, call_id, move.source)
        if entry := self._sessions.get(move.session):
            entry.backend = move.target
            entry.moves += 1

    def finished(self, session: SessionKey | None, total_tokens: int | None, now: float) -> None:
        if session is not None and (entry := self._sessions.get(session)):
            entry.last_seen = now
            entry.total_tokens = total_tokens or entry.total_tokens

    def ended(self, session: SessionKey) -> bool:
        """Whether it was known."""
        return self._sessions.pop(session, None) is not None

    def decisions(self, limit: int) -> list[dict[str, Any]]:
        """The last ones, newest first."""
        return [self._decisions[-1 - i] for i in range(min(limit, len(self._decisions)))]

    def sessions(self, limit: int, now: float) -> list[dict[str, Any]]:
        """The sessions used last, newest first."""
        self._expire(now)
        found: list[dict[str, Any]] = []
        for (tenant, session), entry in reversed(self._sessions.items()):
            if len(found) == limit:
                break
            found.append(
                {
                    "tenant": tenant, "session": session, "backend": entry.backend,
                    "source": entry.source, "calls": entry.calls, "moves": entry.moves,
                    "total_tokens": entry.total_tokens, "idle_s": round(now - entry.last_seen, 3),
                    "age_s": round(now - entry.first_seen, 3),
                }
            )  # fmt: skip
        return found

    def _note(
        self,
        session: SessionKey | None,
        backend: str,
        reason: str,
        call_id: str | None,
        source: str | None = None,
    ) -> None:
        tenant, name = session or (None, None)
        self._decisions.append(
            {
                "at": round(time.time(), 3), "call": call_id, "tenant": tenant, "session": name,
                "backend": backend, "reason": reason, "moved_from": source,
            }
        )  # fmt: skip

    def _expire(self, now: float) -> None:
        while self._sessions:
            entry = next(iter(self._sessions.values()))
            if len(self._sessions) <= self._max_sessions and now - entry.last_seen < self._idle:
                return
            self._sessions.popitem(last=False)
