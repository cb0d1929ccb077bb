"""Workflows between two calls: how long they are away, and when they give up their place."""

from __future__ import annotations

from vllm_saga.policy import decisions, tally
from vllm_saga.policy.agenda import Agenda
from vllm_saga.policy.price import Price
from vllm_saga.policy.residency import Residency
from vllm_saga.policy.retention import Retention
from vllm_saga.policy.tally import Tally
from vllm_saga.policy.timeline import Timeline
from vllm_saga.policy.workflow import Workflow, WorkflowTable

_Absence = tuple[Workflow, float]
"""A workflow, and since when it is idle."""

# The least time for which an engine with nothing to run waits for a resident to return.
_IDLE_ENGINE_S = 1.0
# A workflow that is not back after so many times the gap it declared is late.
_LATE = 2.0


class Absences:
    """Ends the residency of workflows that are away for too long, by three rules.

    A workflow is presumed to have ended when its chance to return falls below `give_up`. While
    others wait, a resident gives way to them once keeping its KV is expected to cost more than
    computing it again (`GapModel.give_way_s`). And an engine that has nothing to run while calls
    are held waits no longer than computing the cheapest resident again would take: so it never
    loses more than twice (ski rental).
    """

    def __init__(
        self,
        residency: Residency,
        table: WorkflowTable,
        price: Price,
        retention: Retention,
        give_up: float,
        counts: Tally,
        timeline: Timeline,
    ) -> None:
        self._residency = residency
        self._retention = retention
        self._table = table
        self._price = price
        self._give_up = give_up
        self._counts = counts
        self._timeline = timeline
        self._ends: Agenda[_Absence] = Agenda(self._lasts)
        self._ways: Agenda[_Absence] = Agenda(self._lasts_as_resident)
        self._busy_at = 0.0

    def __len__(self) -> int:
        return len(self._ends) + len(self._ways)

    def wake(self, workflow: Workflow, now: float) -> float:
        """A workflow comes back (or comes for the first time); returns how long it was away, s."""
        if not self._table.wake(workflow):
            return 0.0
        if workflow.stale:
            workflow.stale = False
            workflow.agent.retract_end_after(workflow.tool, workflow.calls_done)
        gap_s = now - workflow.idle_since
        gaps = workflow.agent.gaps_after(workflow.tool)
        expected_s, declared_s = gaps.quantile_s(0.5), _declared_gap_s(workflow)
        self._count_gap(gap_s, expected_s)
        if declared_s is not None:
            workflow.agent.declared_gaps.observe(declared_s, expected_s, gap_s)
        gaps.observe_return(gap_s)
        self._retention.on_return(workflow, gap_s)
        return gap_s

    def rest(self, workflow: Workflow, now: float) -> None:
        """A workflow has no call in flight: it is in a gap, or it has ended."""
        if not workflow.sessions:
            workflow.idle_since = now
            self.end(workflow)
            return
        self._table.rest(workflow, now)
        if workflow.known:
            patience, way = self._limits_s(workflow)
            absence, idle = (workflow, now), len(self._table.idle)
            self._ends.add(now + patience, absence, idle)
            if workflow.resident and way < patience:
                self._ways.add(now + way, absence, idle)
            for context in workflow.contexts():
                self._retention.on_rest(context, now)

    def end(self, workflow: Workflow) -> None:
        """A workflow has ended, or is forgotten."""
        self._take_leave(workflow)
        if workflow.known:
            self._timeline.add_workflow(workflow)

    def _take_leave(self, workflow: Workflow) -> None:
        """Nothing more is expected of a workflow."""
        self._residency.leave(workflow)
        if workflow.known and not workflow.stale:
            agent, calls = workflow.agent, workflow.calls_done
            if workflow.first_declared is not None:
                agent.declared_calls.observe(*workflow.first_declared, calls)
            agent.observe_end_after(workflow.tool, calls)
            self._retention.on_end(workflow)
            self._counts.see(tally.TASK_S, workflow.idle_since - workflow.began_at)

    def presume_ends(self, now: float) -> None:
        """Workflows away for longer than their class's patience have most likely ended."""
        while (over := self._ends.take(now)) is not None:
            workflow = over[1][0]
            self._take_leave(workflow)
            workflow.stale = True
            workflow.note(now, decisions.PRESUMED_ENDED, decisions.AWAY)

    def note_busy(self, now: float) -> None:
        """The engine has something to run, or nothing is held."""
        self._busy_at = now

    def use_idle_engine(self, now: float) -> None:
        """There are held calls, and none that could run."""
        residents = self._residency.residents
        if now - self._busy_at >= _IDLE_ENGINE_S and residents:
            cheapest = min(residents, key=self._price.again_s)
            if now - self._busy_at >= self._price.again_s(cheapest):
                self._leave(cheapest, decisions.IDLE_ENGINE, now)

    def give_way(self, blocks: int, now: float) -> None:
        """Residents who are away too long for their KV's worth leave, if that frees `blocks`."""
        leaving: list[tuple[float, _Absence]] = []
        most = 0
        while most < blocks and (entry := self._ways.take(now)) is not None:
            leaving.append(entry)
            most += self._residency.promised_blocks(entry[1][0])
        for when, absence in leaving:
            if most < blocks:
                self._ways.add(when, absence, len(self._table.idle))
            else:
                self._leave(absence[0], decisions.WORTH_LESS, now)

    def _limits_s(self, workflow: Workflow) -> tuple[float, float]:
        """Idle seconds after which it is presumed to have ended, and after which it gives way."""
        gaps = workflow.agent.gaps_after(workflow.tool)
        patience = gaps.patience_s(self._give_up)
        break_even = self._price.break_even_s(workflow, len(self._residency.residents))
        hint = workflow.hint
        if hint is not None and hint.ttl_s is not None:
            patience = max(patience, hint.ttl_s)
        declared_s = _declared_gap_s(workflow)
        if declared_s is None or not workflow.agent.declared_gaps.believed:
            return patience, gaps.give_way_s(break_even)
        late_s = _LATE * declared_s
        return max(patience, late_s), 0.0 if declared_s > break_even else late_s

    def _leave(self, workflow: Workflow, why: str, now: float) -> None:
        self._residency.leave(workflow)
        workflow.note(now, decisions.GAVE_WAY, why)
        idle_engine = why == decisions.IDLE_ENGINE
        self._counts.add(tally.LOST_PLACE, tally.IDLE_ENGINE if idle_engine else tally.GAVE_WAY)

    def _count_gap(self, gap_s: float, expected_s: float) -> None:
        self._counts.see(tally.GAP_S, gap_s)
        error_s = gap_s - expected_s
        self._counts.see(
            tally.GAP_ERROR_S, abs(error_s), tally.LATER if error_s > 0.0 else tally.SOONER
        )

    def _lasts(self, absence: _Absence) -> bool:
        workflow, since = absence
        idle = workflow in self._table.idle
        return idle and workflow.idle_since == since and not workflow.stale

    def _lasts_as_resident(self, absence: _Absence) -> bool:
        return absence[0].resident and self._lasts(absence)


def _declared_gap_s(workflow: Workflow) -> float | None:
    """The gap its last call declared; None if it declared none."""
    if workflow.hint is None or workflow.hinted_at_calls != workflow.calls_done - 1:
        return None
    return workflow.hint.gap_s
