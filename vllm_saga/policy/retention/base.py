"""What every retention strategy has in common: who comes before whom, whatever they are worth."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_saga.policy.workflow import Context, Workflow

KeepRank = tuple[int, float]
"""Sort key of an owner of cached blocks: the smallest is evicted first."""

DEAD: KeepRank = (0, 0.0)
UNOWNED: KeepRank = (1, 0.0)
SHARED: KeepRank = (5, 0.0)
_AWAY, _PROTECTED, _HELD, _RESIDENT = 2, 3, 4, 6


class Retention:
    """Ranks the contexts whose KV is cached but not in use.

    Dead contexts (ended sessions, superseded branches) < unowned blocks, LRU < workflows away,
    by `worth` < those of them that are protected < workflows whose call is held, last in line
    first < what several contexts shared that are gone < residents, youngest first: the oldest will
    be finished first, and what it frees lets the others in. What several contexts begin with is
    kept for as long as the last of them.

    A strategy gives `worth`; what it has to learn for it, it is told by the `on_…` methods.
    """

    def ranks(self, contexts: Sequence[Context], now: float) -> list[KeepRank]:
        """The keep ranks of `contexts` at `now`, in the same order."""
        self.prepare(contexts, now)
        return [self._rank(context, now) for context in contexts]

    def _rank(self, context: Context, now: float) -> KeepRank:
        if context.dead:
            return DEAD
        workflow = context.session.workflow
        if workflow.resident:
            return (_RESIDENT, -float(workflow.seq))
        if workflow.held:
            return (_HELD, -workflow.turn)
        protected = now < context.protected_until
        return (_PROTECTED if protected else _AWAY, self.worth(context, now))

    def prepare(self, contexts: Sequence[Context], now: float) -> None:
        """Called once before `worth` is asked of any of `contexts`."""

    def worth(self, context: Context, now: float) -> float:
        """How much the KV of a context whose workflow is away is worth keeping."""
        raise NotImplementedError

    def on_rest(self, context: Context, now: float) -> None:
        """A context's workflow goes away: the time to set `context.protected_until`."""

    def on_return(self, workflow: Workflow, gap_s: float) -> None:
        """A workflow came back after `gap_s` seconds."""

    def on_release(self, workflow: Workflow, held_s: float) -> None:
        """A workflow that had lost its place waited `held_s` seconds to get one."""

    def on_end(self, workflow: Workflow) -> None:
        """A workflow has ended, or is presumed to have."""
