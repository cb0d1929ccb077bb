"""Which context of its session a call extends, and which contexts are dead."""

from __future__ import annotations

from vllm_saga.policy.chain import common_prefix
from vllm_saga.policy.identity import LineageIndex
from vllm_saga.policy.residency import BlockLedger
from vllm_saga.policy.workflow import Arrival, Call, Context, Session

_MAX_IDLE_CONTEXTS = 4


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
        the context goes on, and what it left behind is superseded.
        """
        best, best_common = None, 0
        for context in session.contexts:
            if context.call is None:
                common = common_prefix(context.chain, arrival.chain)
                if common > best_common:
                    best, best_common = context, common
        agent = session.workflow.agent
        if best is not None and (
            best_common >= best.prompt_blocks or best_common > agent.shared_blocks
        ):
            if best.tokens:
                agent.observe_reuse(min(best_common * self._block_size / best.tokens, 1.0))
            self._ledger.uncount(best, keep=best_common)
            best.chain, best.common = arrival.chain, best_common
            return best
        self.retire(session, now)
        agent.observe_first_chain(arrival.chain)
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
