"""Skewed arrivals: session ids that hash more work onto one replica than onto the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.live.scale import ScaledSession
from vllm_saga.router.replicas import score


def work(session: ScaledSession) -> float:
    """KV that a session needs, for how long: tokens x recorded seconds."""
    return session.mean_context_tokens * session.ideal_s


def skewed(
    sessions: Sequence[ScaledSession], replicas: Sequence[str], share: float
) -> list[ScaledSession]:
    """The same sessions in the same order, under other ids.

    Rendezvous hashing, as our router's policy `session` does it, puts `share` of their work on the
    first of `replicas` and the rest evenly on the others, as nearly as whole sessions allow: in
    every stretch from the first one on.
    """
    others = (1 - share) / (len(replicas) - 1)
    shares = [share] + [others] * (len(replicas) - 1)
    done = [0.0] * len(replicas)
    renamed = []
    for session in sessions:
        total = sum(done) + work(session)
        lacking = [total * wanted - has for wanted, has in zip(shares, done, strict=True)]
        target = lacking.index(max(lacking))
        done[target] += work(session)
        name = name_for(session.session_id, replicas, replicas[target])
        renamed.append(replace(session, session_id=name))
    return renamed


def name_for(session_id: str, replicas: Sequence[str], target: str) -> str:
    """`session_id` with the first suffix that hashes it onto `target`."""
    candidates = (f"{session_id}.{k}" for k in itertools.count())
    return next(name for name in candidates if home(name, replicas) == target)


def home(session_id: str, replicas: Sequence[str]) -> str:
    """The replica that our router's policy `session` sends it to."""
    return max(replicas, key=lambda name: score(("", session_id), name))


def shares(sessions: Sequence[ScaledSession], replicas: Sequence[str]) -> dict[str, list[float]]:
    """Share of the sessions, and of their work, that hash onto each replica."""
    here = [[s for s in sessions if home(s.session_id, replicas) == name] for name in replicas]
    each = [sum(map(work, part)) for part in here]
    return {
        "sessions_by_hash": [len(part) / len(sessions) for part in here],
        "work_by_hash": [done / sum(each) for done in each],
    }
