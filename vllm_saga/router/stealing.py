"""Work stealing: which sessions change their home, and when that is worth it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from vllm_saga.router.fleet import Move
from vllm_saga.router.load import Load
from vllm_saga.router.sessions import Session, SessionTable


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When sessions move.

    idle_s: a replica that has had room, and held nothing back, for so long looks for work.
    load_ratio: so does one from which another's load differs by more than this factor.
    margin_s: seconds that a move has to save beyond what it costs.
    stick_factor, stick_s: a session that has moved stays for so many times the move's cost, and for
    so long at least. moves_per_call: times that one call is moved at most, as the engine's clock of
    its hold starts anew every time.
    sources, candidates: replicas, and calls on each, that are looked at for one target.
    """

    idle_s: float = 0.1
    load_ratio: float = 2.0
    margin_s: float = 0.5
    stick_factor: float = 10.0
    stick_s: float = 5.0
    moves_per_call: int = 2
    sources: int = 4
    candidates: int = 32


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A session that waits at a call boundary.

    waits_s: how long it is expected to wait on. cached: whether its home has KV of it.
    """

    session: Session
    waits_s: float
    cached: bool

    def order(self) -> tuple[int, float]:
        """What moves first: new sessions, then those without KV; of these who waits longest."""
        kind = 0 if self.session.new else 2 if self.cached else 1
        return (kind, -self.waits_s)


class Stealing:
    """Moves sessions from where they wait to where they need not, or less.

    A move must save more seconds of waiting than computing the session's context again takes, by a
    margin. Only sessions move of which no call has begun. A replica takes one session in an epoch
    at most; what it has taken counts at once.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds

    def look(self, loads: Sequence[Load], sessions: SessionTable, now: float) -> list[Move]:
        """One epoch: the moves to make now, which have been entered in `sessions` and `loads`."""
        present = [load for load in loads if load.replica.accepting]
        for load in present:
            _note_room(load, now)
        lines = sorted((x for x in present if _has_line(x)), key=Load.share, reverse=True)
        if not lines:
            return []
        takers = sorted((x for x in present if not x.replica.draining), key=Load.share)
        moves = (self._steal(taker, lines, sessions, now) for taker in takers)
        return [move for move in moves if move is not None]

    def better_home(self, session: Session, loads: Sequence[Load], now: float) -> Load | None:
        """Where a session that is about to make a call would wait less than at its home.

        For engines that hold nothing back: there nobody waits in line, but all share the lack of
        room. Those that do hold say who waits, and `look` moves these.
        """
        home = session.home
        if home is None or home.holds_back or session.calls or now < session.sticky_until:
            return None
        if not home.wait_s(0.0):
            return None
        target = min((x for x in loads if x is not home), key=Load.share, default=None)
        if target is None or not self._is_due(home, target, now):
            return None
        saved_s = home.wait_s(0.0) - target.wait_s(session.need)
        cost_s = target.prefill_s(session.tokens)
        if saved_s <= cost_s + self._thresholds.margin_s:
            return None
        self._stick(session, cost_s, now)
        return target

    def _steal(
        self, target: Load, lines: Sequence[Load], sessions: SessionTable, now: float
    ) -> Move | None:
        """What `target` takes from those who have a line, if anything is worth it."""
        limits = self._thresholds
        for source in lines[: limits.sources]:
            if source is target or not self._is_due(source, target, now):
                continue
            waiting = islice(self._waiting(source, sessions, now), limits.candidates)
            for candidate in sorted(waiting, key=_Candidate.order):
                session = candidate.session
                cost_s = target.prefill_s(session.tokens) if candidate.cached else 0.0
                saved_s = candidate.waits_s - _wait_s(target, session.need, now)
                if saved_s > cost_s + limits.margin_s:
                    return self._move(candidate, source, target, saved_s, cost_s, now)
        return None

    def _is_due(self, source: Load, target: Load, now: float) -> bool:
        limits = self._thresholds
        since = target.roomy_since
        roomy = since is not None and now - since >= limits.idle_s
        return roomy or source.share() > limits.load_ratio * target.share()

    def _waiting(self, source: Load, sessions: SessionTable, now: float) -> Iterator[_Candidate]:
        """The sessions in line at `source` that may be moved."""
        for session, waits_s, cached in _line(source, sessions, now):
            if (
                session.home is source
                and session.calls
                and not any(source.replica.calls.get(call_id, True) for call_id in session.calls)
                and now >= session.sticky_until
                and session.moved < self._thresholds.moves_per_call
            ):
                yield _Candidate(session, waits_s, cached)

    def _move(
        self,
        candidate: _Candidate,
        source: Load,
        target: Load,
        saved_s: float,
        cost_s: float,
        now: float,
    ) -> Move:
        session = candidate.session
        reason = ("new", "uncached", "cached")[candidate.order()[0]]
        source.release(session.key)
        session.settle(target)
        target.receive(session.key, session.need)
        target.warm(session.prefix)
        session.moved += 1
        self._stick(session, cost_s, now)
        return Move(
            session.key, source.replica.name, target.replica.name, tuple(session.calls),
            reason, saved_s, cost_s,
        )  # fmt: skip

    def _stick(self, session: Session, cost_s: float, now: float) -> None:
        limits = self._thresholds
        session.sticky_until = now + max(limits.stick_s, limits.stick_factor * cost_s)


def _note_room(load: Load, now: float) -> None:
    """Remember since when a replica has had room and held nothing back."""
    if load.held or not load.kv_tokens or load.share() >= 1.0:
        load.roomy_since = None
    elif load.roomy_since is None:
        load.roomy_since = now


def _has_line(load: Load) -> bool:
    report = load.report
    return bool(load.held) or (report is not None and not load.holds_back and report.waiting > 0)


def _wait_s(target: Load, need: float, now: float) -> float:
    """Seconds that a session of `need` tokens is expected to wait at a replica it comes to."""
    waits_s = target.wait_s(need)
    return max(waits_s, _held_s(target, now)) if target.held else waits_s


def _held_s(load: Load, now: float) -> float:
    """How long the oldest held call of an engine has been held."""
    first = next(iter(load.held.values()))
    return first.held_s + (now - load.report.at if load.report is not None else 0.0)


def _line(
    source: Load, sessions: SessionTable, now: float
) -> Iterator[tuple[Session, float, bool]]:
    """Who waits at a replica: session, seconds it is expected to wait on, whether it has KV there.

    Who has waited so long is expected to wait as long again, if nothing is known that says more.
    """
    if source.held:
        ahead = source.committed() - sum(call.tokens for call in source.held.values())
        age_s = now - source.report.at if source.report is not None else 0.0
        for key, call in list(source.held.items()):
            ahead += call.tokens
            session = sessions.get(key)
            if session is not None:
                waits_s = max(source.wait_s(0.0, ahead), call.held_s + age_s)
                yield session, waits_s, not call.new and key in source.kept
        return
    # vLLM serves first come first served: who waits came last.
    waiting = source.report.waiting if source.report is not None else 0
    for call_id in islice(reversed(source.replica.calls), waiting):
        session = sessions.of_call(call_id)
        if session is not None and session.new:
            yield session, source.wait_s(0.0), False
