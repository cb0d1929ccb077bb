"""SagaPolicy: identity, residency and retention behind one small interface."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable

from vllm_saga.config import SagaConfig
from vllm_saga.policy.chain import common_prefix
from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.graph import AgentClasses
from vllm_saga.policy.identity import Identity, LineageIndex
from vllm_saga.policy.residency import Residency
from vllm_saga.policy.workflow import Arrival, Call, Context, Session, Workflow, WorkflowTable

_Idle = tuple[float, int, Workflow, float]
"""Something is due for an idle workflow: (when, order, workflow, idle since)."""

_MAX_IDLE_CONTEXTS = 4
# An engine with nothing to run while calls are held waits this long for a resident to return: about
# what re-prefilling a displaced context costs, so that waiting never loses more than twice (ski
# rental).
_IDLE_ENGINE_S = 1.0


class SagaPolicy:
    """The brain of one engine. Not thread-safe; every method is O(log n) but for new blocks.

    Args:
        config: the operator's knobs.
        pool_blocks: usable KV blocks of the engine.
        block_size: tokens per block hash.

    Times are seconds of one monotonic clock, given by the caller.
    """

    def __init__(self, config: SagaConfig, pool_blocks: int, block_size: int) -> None:
        self.config = config
        self.block_size = block_size
        self.calls: dict[str, Call] = {}
        self.lineage = LineageIndex(block_size)
        self.classes = AgentClasses()
        self.cost = CostModel()
        self.table = WorkflowTable(
            idle_s=config.session_idle_s,
            max_idle=config.max_sessions,
            max_hashes=max(4 * pool_blocks, 65_536),
        )
        self._identity = Identity(self.table, self.lineage if config.lineage else None)
        self.residency = Residency(
            capacity=max(int(pool_blocks * (1.0 - config.headroom)), 1),
            block_size=block_size,
            growth_reserve=config.growth_reserve,
            max_hold_s=config.max_hold_s,
            break_even_s=self._break_even_s,
        )
        self._order = itertools.count()
        self._busy_at = 0.0
        self._patience: list[_Idle] = []
        self._ways: list[_Idle] = []
        names = ("holds", "forced", "displaced", "gave_way", "sessions_ended")
        self.counters = dict.fromkeys(names, 0)

    # -- events ---------------------------------------------------------------------------------

    def on_arrival(self, arrival: Arrival, now: float) -> None:
        """A call has reached the scheduler. Whether it may run is then `is_held`'s answer."""
        agent = self.classes.get(self._fingerprint(arrival))
        session = self._identity.resolve(arrival, agent)
        workflow = session.workflow
        gap_s = self._wake(workflow, now)
        if not workflow.began_at:
            workflow.began_at = now
        workflow.priority = arrival.priority
        context = self._context_for(session, arrival, now)
        tail = self._prompt_tail(arrival)
        call = Call(arrival.call_id, context, arrival.prompt_tokens, arrival.last, tail, gap_s)
        context.call = call
        workflow.calls[call.call_id] = self.calls[call.call_id] = call
        self._admit_or_hold(workflow, call, now)

    def on_finish(self, call_id: str, total_tokens: int, now: float) -> None:
        """A call has ended in whatever way; its context holds `total_tokens` tokens."""
        call = self.calls.pop(call_id, None)
        if call is None:
            return
        context, session = call.context, call.context.session
        workflow = session.workflow
        del workflow.calls[call_id]
        context.call = None
        context.idle_since = now
        if not self.residency.withdraw(workflow, call_id):
            self._extend(context, call, total_tokens)
            workflow.agent.observe_cycle(call.gap_s + now - call.begun_at)
        self.residency.loose_blocks -= call.loose_blocks
        session.ending |= call.last
        if session.ending and not any(other.call for other in session.contexts):
            self._end_session(session)
        elif len(session.contexts) > _MAX_IDLE_CONTEXTS:
            self._retire_contexts(session, now)
        if workflow.resident:
            self.residency.update(workflow)
        if not workflow.calls:
            self._rest(workflow, now)

    def on_step(self, now: float) -> list[str]:
        """Time has passed: retire who is away too long, let in who fits.

        Returns the calls whose hold is over.
        """
        self._lose_patience(now)
        self._use_idle_engine(now)
        for workflow in self.table.expired(now):
            self._forget(workflow)
        released: list[str] = []
        while (entrant := self._next_to_enter(now)) is not None:
            overdue = now - entrant.held_since >= self.config.max_hold_s
            fits = not overdue or self.residency.fits(entrant)
            call_ids = self.residency.unhold(entrant)
            calls = [self.calls[call_id] for call_id in call_ids]
            if fits:
                self._let_in(entrant, calls, now)
            else:
                self.counters["forced"] += 1
                self._let_visit(calls, now)
            released += call_ids
        return released

    def reset(self) -> None:
        """The prefix cache was emptied: nothing is cached any more, and nobody holds a block."""
        for workflow in list(self.residency.residents):
            if not workflow.calls:
                self.residency.leave(workflow)

    # -- questions ------------------------------------------------------------------------------

    def is_held(self, call_id: str) -> bool:
        """Whether a call has to wait for its workflow's residency."""
        call = self.calls.get(call_id)
        return call is not None and call_id in call.context.session.workflow.held

    def owner(self, call_id: str) -> Context | None:
        """The context that owns a call's blocks; None for calls scheduled as stock would."""
        call = self.calls.get(call_id)
        if call is None or not call.context.session.workflow.known:
            return None
        return call.context

    def running_rank(self, call_id: str) -> tuple[bool, int]:
        """Sort key of running calls: under pressure the largest is preempted first."""
        call = self.calls.get(call_id)
        if call is None:
            return (True, 0)
        workflow = call.context.session.workflow
        return (not workflow.resident and workflow.known, workflow.seq)

    def state(self) -> dict[str, int]:
        """Sizes of every table and the counters, for logs and tests."""
        return {
            "resident": len(self.residency.residents),
            "held": self.residency.held_workflows,
            "calls": len(self.calls),
            "sessions": len(self.table.sessions),
            "idle": len(self.table.idle),
            "lineage": len(self.lineage),
            "classes": len(self.classes),
            "ledger_blocks": len(self.residency.ledger),
            "used_blocks": self.residency.used_blocks,
            "capacity_blocks": self.residency.capacity,
            **self.counters,
        }

    # -- admission ------------------------------------------------------------------------------

    def _admit_or_hold(self, workflow: Workflow, call: Call, now: float) -> None:
        residency = self.residency
        if not self.config.residency or workflow.resident:
            self._let_in(workflow, [call], now)
        elif workflow.held or residency.held_workflows:
            self._hold(workflow, call, now)
        elif not workflow.known or residency.fits(workflow):
            self._let_in(workflow, [call], now)
        else:
            self._hold(workflow, call, now)

    def _hold(self, workflow: Workflow, call: Call, now: float) -> None:
        self.counters["holds"] += 1
        if not self.residency.held_calls:
            self._busy_at = now
        self.residency.hold(workflow, call.call_id, now, self._turn(workflow, call))

    def _turn(self, workflow: Workflow, call: Call) -> float:
        """When it is the workflow's turn to enter: the least first.

        Oldest first, but one that is expected to fill the whole pool for a second counts as
        `short_first` seconds younger.
        """
        agent, done = workflow.agent, workflow.calls_done
        now_tokens = max(call.prompt_tokens, sum(c.tokens for c in workflow.contexts()))
        tokens = now_tokens + agent.remaining_growth_tokens(done) / 2
        share = tokens / (self.residency.capacity * self.block_size)
        return workflow.began_at + self.config.short_first * share * agent.remaining_s(done)

    def _let_in(self, workflow: Workflow, calls: list[Call], now: float) -> None:
        residency = self.residency
        if not workflow.known:
            self._let_visit(calls, now)
            return
        for call in calls:
            call.begun_at = now
        if workflow.resident:
            residency.update(workflow)
        else:
            residency.enter(workflow)
        self.counters["displaced"] += residency.make_room(workflow)

    def _let_visit(self, calls: list[Call], now: float) -> None:
        """Calls run without residency: of unknown workflows, or overdue in a full pool.

        If who is overdue became resident, it would displace another that is overdue next: in deep
        overload all would take turns at recomputing their contexts.
        """
        for call in calls:
            call.begun_at = now
            call.loose_blocks = 1 + self.residency.ledger.missing(call.context.chain)
            self.residency.loose_blocks += call.loose_blocks

    # -- contexts -------------------------------------------------------------------------------

    def _context_for(self, session: Session, arrival: Arrival, now: float) -> Context:
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
            self.residency.ledger.uncount(best, keep=best_common)
            best.chain = arrival.chain
            return best
        self._retire_contexts(session, now)
        agent.observe_first_chain(arrival.chain)
        context = Context(session, arrival.chain)
        session.contexts.append(context)
        return context

    def _extend(self, context: Context, call: Call, total_tokens: int) -> None:
        """A call that has run left its context `total_tokens` long."""
        workflow = context.session.workflow
        workflow.calls_done += 1
        if workflow.known:
            before = context.tokens or call.prompt_tokens
            workflow.agent.observe_growth(max(total_tokens - before, 0))
        context.tokens = total_tokens
        context.prompt_tokens = call.prompt_tokens
        context.prompt_tail = call.tail
        context.prompt_blocks = min(call.prompt_tokens // self.block_size, len(context.chain))
        if self.config.lineage:
            self.lineage.add(context)

    def _retire_contexts(self, session: Session, now: float) -> None:
        """Idle contexts that a session has most likely left behind are dead."""
        patience = session.workflow.agent.gaps.patience_s(self.config.give_up_probability)
        idle = sorted((c for c in session.contexts if c.call is None), key=lambda c: c.idle_since)
        excess = len(idle) - _MAX_IDLE_CONTEXTS
        for index, context in enumerate(idle):
            if index < excess or now - context.idle_since > patience:
                session.contexts.remove(context)
                self._kill(context)

    def _kill(self, context: Context) -> None:
        context.dead = True
        self.lineage.remove(context)
        self.residency.ledger.uncount(context)

    def _end_session(self, session: Session) -> None:
        """A session has said that it is over: what it cached is dead at once."""
        self.counters["sessions_ended"] += 1
        for context in session.contexts:
            self._kill(context)
        session.contexts.clear()
        self.table.drop_session(session)

    # -- idleness -------------------------------------------------------------------------------

    def _wake(self, workflow: Workflow, now: float) -> float:
        """A workflow comes back (or comes for the first time); returns how long it was away."""
        if not self.table.wake(workflow):
            return 0.0
        if workflow.stale:
            workflow.stale = False
            workflow.agent.gaps.retract_end()
        gap_s = now - workflow.idle_since
        workflow.agent.gaps.observe_return(gap_s)
        return gap_s

    def _rest(self, workflow: Workflow, now: float) -> None:
        """A workflow has no call in flight: it is in a gap, or it has ended."""
        if not workflow.sessions:
            self.residency.leave(workflow)
            workflow.agent.observe_end(workflow.calls_done)
            return
        self.table.rest(workflow, now)
        if workflow.known:
            patience = workflow.agent.gaps.patience_s(self.config.give_up_probability)
            entry = (now + patience, next(self._order), workflow, now)
            self._push(self._patience, entry)
            way = workflow.agent.gaps.give_way_s(self._break_even_s(workflow))
            if workflow.resident and way < patience:
                self._push(self._ways, (now + way, next(self._order), workflow, now))

    def _push(self, heap: list[_Idle], entry: _Idle) -> None:
        heapq.heappush(heap, entry)
        if len(heap) > 4 * len(self.table.idle) + 64:
            heap[:] = [e for e in heap if self._is_waiting(e[2], e[3])]
            heapq.heapify(heap)

    def _break_even_s(self, workflow: Workflow) -> float:
        """Seconds of holding the workflow's KV that cost what computing it again does.

        A pool of blocks is worth `cost.spare` engine seconds a second to those who wait for it, a
        part of it that part. Nothing is given up before steps have been timed.
        """
        if not self.cost.known:
            return math.inf
        tokens = [max(context.tokens, 1) for context in workflow.contexts()]
        again_s = sum(map(self.cost.prefill_s, tokens))
        share = sum(tokens) / (self.residency.capacity * self.block_size)
        return again_s / max(self.config.price * self.cost.spare * share, 1e-9)

    def _next_to_enter(self, now: float) -> Workflow | None:
        """Who enters now; residents who are away too long for their KV's worth give way to them."""
        residency = self.residency
        entrant = residency.next_to_enter(now)
        if entrant is not None or not residency.held_workflows:
            return entrant
        first = residency.first_in_line()
        missing = residency.shortfall(first) if first else 0
        due, most = [], 0
        while most < missing and self._ways and self._ways[0][0] <= now:
            entry = heapq.heappop(self._ways)
            if entry[2].resident and self._is_waiting(entry[2], entry[3]):
                due.append(entry)
                most += residency.promised_blocks(entry[2])
        for entry in due:
            if most < missing:
                heapq.heappush(self._ways, entry)
            else:
                residency.leave(entry[2])
                self.counters["gave_way"] += 1
        return residency.next_to_enter(now)

    def _is_waiting(self, workflow: Workflow, since: float) -> bool:
        idle = workflow in self.table.idle
        return idle and workflow.idle_since == since and not workflow.stale

    def _lose_patience(self, now: float) -> None:
        """Workflows away longer than their class's patience have most likely ended."""
        while self._patience and self._patience[0][0] <= now:
            _, _, workflow, since = heapq.heappop(self._patience)
            if self._is_waiting(workflow, since):
                self._presume_ended(workflow)

    def _use_idle_engine(self, now: float) -> None:
        """Nothing to run, but calls are held: the resident longest away loses its place."""
        residency = self.residency
        if len(self.calls) > residency.held_calls or not residency.held_calls:
            self._busy_at = now
        elif now - self._busy_at >= _IDLE_ENGINE_S and residency.residents:
            self._presume_ended(min(residency.residents, key=lambda w: w.idle_since))

    def _presume_ended(self, workflow: Workflow) -> None:
        workflow.stale = True
        workflow.agent.observe_end(workflow.calls_done)
        self.residency.leave(workflow)

    def _forget(self, workflow: Workflow) -> None:
        """An idle workflow's time or room is up."""
        self.residency.leave(workflow)
        if workflow.known and not workflow.stale:
            workflow.agent.observe_end(workflow.calls_done)
        for context in workflow.contexts():
            self._kill(context)

    # -- small things ---------------------------------------------------------------------------

    def _fingerprint(self, arrival: Arrival) -> Hashable:
        return (arrival.tenant, arrival.chain[0] if arrival.chain else None)

    def _prompt_tail(self, arrival: Arrival) -> tuple[int, ...]:
        if arrival.tokens is None:
            return ()
        return tuple(arrival.tokens[arrival.prompt_tokens // self.block_size * self.block_size :])
