"""Which sessions of a trace a run plays, and in which order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from vllm_saga.simulator.trace import Session, TraceError


@dataclass(frozen=True, slots=True)
class Population:
    """Sessions to play in this order; `dropped` sessions of the trace were too long."""

    sessions: list[Session]
    dropped: int


def population(
    sessions: Sequence[Session],
    count: int,
    seed: int,
    max_gap_s: float | None = None,
    max_context: int | None = None,
) -> Population:
    """`count` sessions in a seeded order; the first n are the same whatever `count` is.

    Every session is drawn once before any is drawn again; a further copy has `~2`, `~3`, ... behind
    its id, and so its own content and its own draws for unknown gaps, and arrives one length of
    the trace later. `max_gap_s` shortens every gap, drawn ones too. Sessions whose context exceeds
    `max_context` tokens are left out. Raises `TraceError` if that leaves none.
    """
    if count < 1:
        raise ValueError(f"count: {count} is not at least 1")
    fitting = [s for s in sessions if max_context is None or _longest(s) <= max_context]
    if not fitting:
        shortest = min((_longest(s) for s in sessions), default=0)
        raise TraceError(
            f"none of {len(sessions)} sessions fits {max_context} tokens of context; "
            f"the shortest needs {shortest}"
        )
    rng = random.Random(f"population/{seed}")
    order = list(fitting)
    rng.shuffle(order)
    drawn = order[:count]
    drawn += [rng.choice(fitting) for _ in range(count - len(drawn))]
    span_s = max((s.arrival_s or 0.0 for s in fitting), default=0.0)
    period_s = span_s * len(fitting) / max(1, len(fitting) - 1)
    copies: Counter[str] = Counter()
    out = []
    for session in drawn:
        copies[session.session_id] += 1
        session = _copy(session, copies[session.session_id], period_s)
        out.append(session if max_gap_s is None else _clip(session, max_gap_s))
    return Population(out, len(sessions) - len(fitting))


def _longest(session: Session) -> int:
    return max(call.context_tokens for call in session.calls)


def _copy(session: Session, number: int, period_s: float) -> Session:
    """The session under the name of its `number`-th copy."""
    if number == 1:
        return session
    arrival_s = session.arrival_s
    return msgspec.structs.replace(
        session,
        session_id=f"{session.session_id}~{number}",
        arrival_s=None if arrival_s is None else arrival_s + (number - 1) * period_s,
    )


def _clip(session: Session, max_gap_s: float) -> Session:
    """The session with no delay, recorded or drawn, above `max_gap_s`."""
    calls = []
    for call, delay_s in zip(session.calls, session.delays_s, strict=True):
        changes: dict[str, float] = {}
        if delay_s > max_gap_s:
            changes["delay_s"] = max_gap_s
        if call.tool_latency_s is not None and call.tool_latency_s > max_gap_s:
            changes["tool_latency_s"] = max_gap_s
        calls.append(msgspec.structs.replace(call, **changes) if changes else call)
    return msgspec.structs.replace(session, calls=tuple(calls))
