"""Where the calls of sessions went among several replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.live.replay import CallRecord, SessionRecord


def summarise(sessions: Sequence[SessionRecord], replicas: int) -> dict[str, Any]:
    """What a run with several replicas has besides; None where no server has named itself.

    colocation: share of the calls, but for first ones, that went where the session's call before
    them went. busiest_share: of all calls, those of the replica that had the most. decisions: why
    calls went where they went, as our router says.
    """
    calls = [call for session in sessions for call in session.calls]
    named = Counter(call.replica for call in calls if call.replica is not None)
    decisions = Counter(call.decision for call in calls if call.decision is not None)
    steps = [step for session in sessions for step in _steps(session)]
    known = [(a.replica, b.replica) for a, b in steps if a.replica and b.replica]
    return {
        "replicas": replicas,
        "colocation": sum(a == b for a, b in known) / len(known) if known else None,
        "replica_calls": dict(sorted(named.items())),
        "busiest_share": max(named.values()) / named.total() if named else None,
        "decisions": dict(decisions.most_common()),
    }


def _steps(session: SessionRecord) -> Iterator[tuple[CallRecord, CallRecord]]:
    """Each call of a session with the one that was sent before it."""
    return pairwise(sorted(session.calls, key=lambda call: call.issued))
