"""Which cached block dies first, when stock's LRU would take one of a workflow still alive."""

from __future__ import annotations

from vllm_saga.policy.workflow import Context

KeepRank = tuple[int, float]
"""Sort key of an owner of cached blocks: the smallest is evicted first."""

DEAD: KeepRank = (0, 0.0)
UNOWNED: KeepRank = (1, 0.0)
SHARED: KeepRank = (4, 0.0)


def keep_rank(context: Context) -> KeepRank:
    """How much the cached blocks of `context` are worth keeping.

    Dead contexts (ended sessions, superseded branches) < unowned blocks < workflows presumed to
    have ended, longest away first < workflows waiting for residency, last in line first < prefixes
    shared by several contexts < residents, youngest first: the oldest will be finished first, and
    what it frees lets the others in.
    """
    if context.dead:
        return DEAD
    workflow = context.session.workflow
    if workflow.stale:
        return (2, workflow.idle_since)
    return (5 if workflow.resident else 3, -float(workflow.seq))
