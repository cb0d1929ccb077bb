"""Which context of its session a call extends, and which contexts are dead."""

from __future__ import annotations

from vllm_saga.policy.chain import common_prefix
from vllm_saga.policy.identity import LineageIndex
from vllm_saga.policy.residency import BlockLedger
from vllm_saga.policy.workflow import Arrival, Call, Context, Session

_MAX_IDLE_CONTEXTS = 4
# A session that has made so many calls elsewhere has left a context, whatever is usual.
_LEFT_AFTER = 8


class Contexts:
    """Keeps the contexts of sessions: matched to calls, extended, retired.

    Args:
        ledger: told when a context's blocks are no longer its own.
        lineage: where contexts are found again by their content; None = nowhere.
        give_up: an idle context is retired when its class's chance to return is below this.
    """

    def __init__(
        self, ledger: BlockLedger, lineage: LineageIndex | None, block_size: int, give_up: float
    ) -> None:
        self._ledger = ledger
        self._lineage = lineage
        self._block_size = block_size
        self._give_up = give_up

    def of(self, session: Session, arrival: Arrival, now: float) -> Context:
        """The context this call extends or edits; a new one for a side call or a sub-agent.

        A prompt that leaves the last one early but beyond what its whole class shares is an edit:
        the context goes on, and what it left behind is superseded. A context that idles while its
        session calls elsewhere is left, where those of its class are mostly not taken up again.
        """
        context = self._extended(session, arrival) or self._new(session, arrival, now)
        agent = session.workflow.agent
        if context.skipped:
            agent.observe_skipped(context.skipped, True)
        context.skipped, context.left = 0, False
        for other in session.contexts:
            if other is not context and other.call is None:
                other.skipped += 1
                if other.skipped == _LEFT_AFTER:
                    agent.observe_skipped(_LEFT_AFTER, False)
                if other.skipped >= _LEFT_AFTER or not agent.takes_up(other.skipped):
                    other.left = True
                    self._ledger.uncount(other)
        return context

    def _extended(self, session: Session, arrival: Arrival) -> Context | None:
        best, best_common = None, 0
        for context in session.contexts:
            if context.call is None:
                common = common_prefix(context.chain, arrival.chain)
                if common > best_common:
                    best, best_common = context, common
        agent = session.workflow.agent
        if best is None or (
            best_common < best.prompt_blocks and best_common <= agent.shared_blocks
        ):
            return None
        if best.tokens:
            agent.observe_reuse(min(best_common * self._block_size / best.tokens, 1.0))
        self._ledger.uncount(best, keep=best_common)
        best.chain, best.common = arrival.chain, best_common
        return best

    def _new(self, session: Session, arrival: Arrival, now: float) -> Context:
        self.retire(session, now)
        session.workflow.agent.observe_first_chain(arrival.chain)
        context = Context(session, arrival.chain)
        session.contexts.append(context)
        return context

    def extend(self, context: Context, call: Call, total_tokens: int) -> int:
        """A call that has run left its context `total_tokens` long; returns how many are new."""
        before = context.tokens or call.prompt_tokens
        context.tokens = total_tokens
        context.prompt_tokens = call.prompt_tokens
        context.prompt_tail = call.tail
        context.prompt_blocks = min(call.prompt_tokens // self._block_size, len(context.chain))
        if self._lineage is not None:
            self._lineage.add(context)
        return max(total_tokens - before, 0)

    def retire(self, session: Session, now: float) -> None:
        """Idle contexts that a session has most likely left behind are dead."""
        patience = session.workflow.agent.gaps.patience_s(self._give_up)
        idle = sorted((c for c in session.contexts if c.call is None), key=lambda c: c.idle_since)
        excess = len(idle) - _MAX_IDLE_CONTEXTS
        for index, context in enumerate(idle):
            if index < excess or now - context.idle_since > patience:
                session.contexts.remove(context)
                self.kill(context)

    def retire_excess(self, session: Session, now: float) -> None:
        """`retire`, where a session has more contexts than it should."""
        if len(session.contexts) > _MAX_IDLE_CONTEXTS:
            self.retire(session, now)

    def kill(self, context: Context) -> None:
        """Nobody will extend `context` again: what it cached is the first to go."""
        context.dead = True
        self._ledger.uncount(context)
        if self._lineage is not None:
            self._lineage.remove(context)
