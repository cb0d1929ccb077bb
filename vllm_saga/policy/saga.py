"""SagaPolicy: identity, residency and retention behind one small interface."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vllm_saga.config import SagaConfig
from vllm_saga.policy import decisions, pace, tally
from vllm_saga.policy.absence import Absences
from vllm_saga.policy.contexts import Contexts
from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.fairness import FairShare
from vllm_saga.policy.graph import AgentClasses
from vllm_saga.policy.identity import Identity, LineageIndex
from vllm_saga.policy.meter import Meter
from vllm_saga.policy.price import Price
from vllm_saga.policy.residency import Residency
from vllm_saga.policy.retention import KeepRank, choose
from vllm_saga.policy.tally import Tally
from vllm_saga.policy.timeline import Timeline
from vllm_saga.policy.toolgraph import JOINT, SUBAGENTS, node_name
from vllm_saga.policy.workflow import Arrival, Call, Context, Session, Workflow, WorkflowTable


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
        capacity = max(int(pool_blocks * (1.0 - config.headroom)), 1)
        price = Price(self.cost, config.patience, capacity * block_size, config.overdraft)
        self.share = FairShare(config.tenant_weights, config.fair_window_s, config.slo_factor)
        self._meter = Meter(self.share, self.cost, capacity)
        self.residency = Residency(
            capacity,
            block_size,
            config.patience,
            config.max_hold_s,
            config.max_step_hold_s,
            self.share,
            lambda: len(self.calls) - self.residency.held_calls,
            lambda workflow, held: price.overdraft_tokens(workflow, held) // block_size,
        )
        lineage = self.lineage if config.lineage else None
        self._identity = Identity(self.table, lineage)
        give_up = config.give_up_probability
        self._contexts = Contexts(self.residency.ledger, lineage, block_size, give_up)
        self.retention = choose(config.retention, self.residency, price)
        self.tally = Tally()
        self.timeline = Timeline()
        self._absences = Absences(
            self.residency, self.table, price, self.retention, give_up, self.tally, self.timeline
        )

    # -- events ---------------------------------------------------------------------------------

    def on_arrival(self, arrival: Arrival, now: float) -> None:
        """A call has reached the scheduler. Whether it may run is then `is_held`'s answer."""
        agent = self.classes.get(self._fingerprint(arrival))
        session = self._identity.resolve(arrival, agent)
        workflow = session.workflow
        self._meter.hold(workflow, now)
        gap_s = self._absences.wake(workflow, now)
        if not workflow.began_at:
            workflow.began_at = now
        workflow.priority = arrival.priority
        if arrival.hint is not None:
            workflow.declare(arrival.hint, now)
        context = self._contexts.of(session, arrival, now)
        if context.tokens and workflow.last_session is not session:
            self._join(context, now)
        tail = self._prompt_tail(arrival)
        call = Call(arrival.call_id, context, arrival.prompt_tokens, arrival.last, tail, gap_s, now)
        # Of what has run the last token is not in the cache.
        had = min(context.common * self.block_size, max(context.tokens - 1, 0))
        call.reused_tokens = (
            min(had, arrival.prompt_tokens - 1) // self.block_size * self.block_size
        )
        context.call = call
        workflow.calls[call.call_id] = self.calls[call.call_id] = call
        self._admit_or_hold(workflow, call, now)

    def on_finish(
        self, call_id: str, total_tokens: int, now: float, tools: Sequence[str] | None = None
    ) -> None:
        """A call has ended in whatever way; its context holds `total_tokens` tokens.

        tools: what its output calls, by name; None if that is not known.
        """
        call = self.calls.pop(call_id, None)
        if call is None:
            return
        context, session = call.context, call.context.session
        workflow = session.workflow
        del workflow.calls[call_id]
        context.call = None
        context.idle_since = now
        self._meter.hold(workflow, now)
        withdrawn = self.residency.withdraw(workflow, call_id)
        if withdrawn:
            self.tally.add(tally.ABORTED)
        else:
            self._meter.run(call, total_tokens, now)
            growth_tokens = self._contexts.extend(context, call, total_tokens)
            workflow.agent.observe_output(max(total_tokens - call.prompt_tokens, 0))
            self._learn(call, growth_tokens, tools, now)
        if workflow.known:
            self.timeline.add_call(call, total_tokens, withdrawn, now)
        self.residency.loose_blocks -= call.loose_blocks
        session.ending |= call.last
        if session.ending and not any(other.call for other in session.contexts):
            self._end_session(session)
        else:
            self._contexts.retire_excess(session, now)
        if workflow.resident:
            self.residency.update(workflow)
        if not workflow.calls:
            self._absences.rest(workflow, now)

    def on_scheduled(self, call_id: str, cached_tokens: int) -> None:
        """A call runs from now on; so many of its tokens were in the prefix cache."""
        call = self.calls.get(call_id)
        if call is not None:
            call.cached_tokens = cached_tokens
            lost = max(call.reused_tokens - cached_tokens, 0)
            call.context.session.workflow.lost_tokens += lost
            self.tally.add(tally.RESUMED_TOKENS, tally.LOST, lost)
            self.tally.add(tally.RESUMED_TOKENS, tally.HIT, call.reused_tokens - lost)

    def on_step(self, now: float) -> list[str]:
        """Time has passed: retire who is away too long, let in who fits.

        Returns the calls whose hold is over.
        """
        held = self.residency.held_calls
        self._absences.review(now)
        if 0 < held == len(self.calls):
            self._absences.use_idle_engine(now)
        else:
            self._absences.note_busy(now)
        for workflow in self.table.expired(now):
            self._absences.end(workflow)
            for context in workflow.contexts():
                self._contexts.kill(context)
        released: list[str] = []
        while (entrant := self._next_to_enter(now)) is not None:
            held_s = now - entrant.held_since
            kind = tally.BEGUN if entrant.calls_done else tally.NEW
            self.tally.see(tally.HOLD_S, held_s, kind)
            overdue = now >= entrant.held_until
            if entrant.was_resident:
                self.retention.on_release(entrant, held_s)
            fits = not overdue or self.residency.fits(entrant)
            call_ids = self.residency.unhold(entrant)
            calls = [self.calls[call_id] for call_id in call_ids]
            if fits:
                self._let_in(entrant, calls, now)
            else:
                self.tally.add(tally.FORCED)
                entrant.note(now, decisions.FORCED, decisions.OVERDUE)
                self._let_visit(calls, now)
            released += call_ids
        return released

    def end_session(self, session: Session, now: float) -> None:
        """A session is over: it ends now, or with its calls in flight."""
        session.ending = True
        if any(context.call for context in session.contexts):
            return
        workflow = session.workflow
        self._meter.hold(workflow, now)
        self._end_session(session)
        if workflow.resident:
            self.residency.update(workflow)
        if not workflow.sessions:
            self.table.wake(workflow)
            self._absences.end(workflow)

    def reset(self, now: float) -> None:
        """The prefix cache was emptied: nothing is cached any more, and nobody holds a block."""
        for workflow in list(self.residency.residents):
            if not workflow.calls:
                self.residency.leave(workflow)
                workflow.note(now, decisions.LEFT, decisions.EMPTIED)

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

    def keep_ranks(self, owners: Sequence[Context], now: float) -> Sequence[KeepRank]:
        """How much the cached blocks of each owner are worth keeping: the least dies first."""
        return self.retention.ranks(owners, now)

    def rank_epoch(self, now: float) -> tuple[int, int]:
        """Changes when the order of `keep_ranks` may have: with who is resident, or in a second."""
        return (self.residency.changes, int(now))

    def paces(self) -> bool:
        """Whether prefills go at a pace: agents wait for room, and a step has tokens to spare."""
        tight = self.residency.tight and self.config.pace_prefills
        return tight and self.cost.fit.free_tokens > 0

    def prefill_tokens(self, decode_tokens: int, decoding: int, prefilling: int) -> int | None:
        """How many tokens the next step should prefill; None = as many as it can (pace.py)."""
        return pace.prefill_tokens(self.cost.fit, decode_tokens, decoding, prefilling)

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
            "gave_way": self.tally.count(tally.LOST_PLACE, tally.GAVE_WAY, tally.IDLE_ENGINE),
            "holds": self.tally.count(tally.HOLDS, tally.NO_ROOM, tally.IN_LINE),
            "forced": self.tally.count(tally.FORCED),
            "displaced": self.tally.count(tally.LOST_PLACE, tally.DISPLACED),
            "sessions_ended": self.tally.count(tally.ENDED),
        }

    # -- admission ------------------------------------------------------------------------------

    def _admit_or_hold(self, workflow: Workflow, call: Call, now: float) -> None:
        residency = self.residency
        if not self.config.residency or workflow.resident:
            self._let_in(workflow, [call], now)
        elif workflow.held or residency.held_workflows:
            if not workflow.held:
                workflow.note(now, decisions.HELD, decisions.IN_LINE)
            self._hold(workflow, call, now, tally.IN_LINE)
        elif not workflow.known or residency.fits(workflow):
            self._let_in(workflow, [call], now)
        else:
            workflow.note(now, decisions.HELD, decisions.NO_ROOM, residency.shortfall(workflow))
            self._hold(workflow, call, now, tally.NO_ROOM)

    def _hold(self, workflow: Workflow, call: Call, now: float, reason: str) -> None:
        self.tally.add(tally.HOLDS, reason)
        if not self.residency.held_calls:
            self._absences.note_busy(now)
        self.residency.hold(workflow, call.call_id, now, self._turn(workflow, call))

    def _turn(self, workflow: Workflow, call: Call) -> float:
        """When it is the workflow's turn to enter: the least first.

        Oldest first, but one that is expected to fill the whole pool for a second counts as
        `short_first` seconds younger.
        """
        now_tokens = max(call.prompt_tokens, sum(c.tokens for c in workflow.wanted()))
        tokens = now_tokens + workflow.remaining_growth_tokens() / 2
        share = tokens / (self.residency.capacity * self.block_size)
        return workflow.began_at + self.config.short_first * share * workflow.remaining_s()

    def _next_to_enter(self, now: float) -> Workflow | None:
        """Who enters now; residents who are away too long for their KV's worth give way to them."""
        residency = self.residency
        entrant = residency.next_to_enter(now)
        if entrant is not None or not residency.held_workflows:
            return entrant
        first = residency.first_in_line(now)
        if first is not None:
            self._absences.give_way(residency.shortfall(first), now)
        return residency.next_to_enter(now)

    def _let_in(self, workflow: Workflow, calls: list[Call], now: float) -> None:
        residency = self.residency
        if not workflow.known:
            if workflow.decisions:
                workflow.note(now, decisions.ENTERED, decisions.FITTED)
            self._let_visit(calls, now)
            return
        for call in calls:
            call.begun_at = now
        if workflow.resident:
            residency.update(workflow)
        else:
            workflow.charged_at = now
            residency.enter(workflow)
            workflow.note(now, decisions.ENTERED, decisions.FITTED)
        displaced = residency.make_room(workflow)
        self.tally.add(tally.LOST_PLACE, tally.DISPLACED, len(displaced))
        for other in displaced:
            other.note(now, decisions.DISPLACED, decisions.OUTGROWN)

    def _let_visit(self, calls: list[Call], now: float) -> None:
        """Calls run without residency: of unknown workflows, or overdue in a full pool.

        If who is overdue became resident, it would displace another that is overdue next: in deep
        overload all would take turns at recomputing their contexts.
        """
        for call in calls:
            call.begun_at = now
            call.loose_blocks = 1 + self.residency.ledger.missing(call.context.chain)
            self.residency.loose_blocks += call.loose_blocks

    # -- the rest -------------------------------------------------------------------------------

    def _learn(
        self, call: Call, growth_tokens: int, tools: Sequence[str] | None, now: float
    ) -> None:
        """A call has run, and leads to `tools`."""
        context = call.context
        workflow = context.session.workflow
        workflow.calls_done += 1
        hint = workflow.hint
        if tools is None and hint is not None and hint.next_tool is not None:
            tools = hint.next_tool.split(JOINT)
        tool = None if tools is None else node_name(tools)
        if workflow.known:
            workflow.agent.observe_call(context.tool, tool, growth_tokens)
        context.tool = workflow.tool = tool
        workflow.last_session = context.session
        workflow.agent.observe_cycle(call.gap_s + now - call.begun_at)

    def _join(self, context: Context, now: float) -> None:
        """A context goes on after others of its workflow have run: it waited for sub-agents."""
        agent = context.session.workflow.agent
        agent.observe_join(context.tool)
        context.tool = SUBAGENTS
        agent.gaps_after(SUBAGENTS).observe_return(now - context.idle_since)

    def _end_session(self, session: Session) -> None:
        """A session has said that it is over: what it cached is dead at once."""
        self.tally.add(tally.ENDED)
        for context in session.contexts:
            self._contexts.kill(context)
        session.contexts.clear()
        self.table.drop_session(session)

    def _fingerprint(self, arrival: Arrival) -> Hashable:
        return (arrival.tenant, arrival.chain[0] if arrival.chain else None)

    def _prompt_tail(self, arrival: Arrival) -> tuple[int, ...]:
        if arrival.tokens is None:
            return ()
        return tuple(arrival.tokens[arrival.prompt_tokens // self.block_size * self.block_size :])
