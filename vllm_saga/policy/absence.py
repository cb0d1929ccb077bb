"""Workflows between two calls: how long they are away, and when they give up their place."""

from __future__ import annotations

import math

from vllm_saga.policy import decisions, tally
from vllm_saga.policy.agenda import Agenda
from vllm_saga.policy.gaps import DOUBT, judged_again_at
from vllm_saga.policy.price import Price
from vllm_saga.policy.residency import Residency
from vllm_saga.policy.retention import Retention
from vllm_saga.policy.tally import Tally
from vllm_saga.policy.timeline import Timeline
from vllm_saga.policy.workflow import Workflow, WorkflowTable

_Absence = tuple[Workflow, float]
"""A workflow, and since when it is idle."""
_Way = tuple[Workflow, float]
"""A resident, and when it gives way."""

# For so long an engine with nothing to run waits for a resident while costs are not known.
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

    What is learned while a workflow is away counts for it, too: it is judged anew when its return
    becomes doubtful, and then whenever its absence has doubled. From that doubt on its class counts
    it as ended, until it returns: else those who never do would be missing in what is known of all,
    for as long as the last of them might.
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
        self._reviews: Agenda[_Absence] = Agenda(self._lasts)
        self._ways: Agenda[_Way] = Agenda(self._gives_way)
        self._busy_at = 0.0

    def __len__(self) -> int:
        return len(self._reviews) + len(self._ways)

    def wake(self, workflow: Workflow, now: float) -> float:
        """A workflow comes back (or comes for the first time); returns how long it was away, s."""
        if not self._table.wake(workflow):
            return 0.0
        gap_s = now - workflow.idle_since
        if workflow.known:
            self._note_return(workflow, gap_s)
        return gap_s

    def _note_return(self, workflow: Workflow, gap_s: float) -> None:
        agent = workflow.agent
        self._count_calls(workflow)
        workflow.stale = False
        workflow.gives_way_at = math.inf
        if workflow.doubted:
            workflow.doubted = False
            agent.retract_end_after(workflow.tool, workflow.calls_done)
        gaps = agent.gaps_after(workflow.tool)
        expected_s, declared_s = gaps.quantile_s(0.5), _declared_gap_s(workflow)
        self._count_gap(gap_s, expected_s)
        if declared_s is not None:
            agent.declared_gaps.observe(declared_s, expected_s, gap_s)
        gaps.observe_return(gap_s)
        self._retention.on_return(workflow, gap_s)

    def rest(self, workflow: Workflow, now: float) -> None:
        """A workflow has no call in flight: it is in a gap, or it has ended."""
        if not workflow.sessions:
            workflow.idle_since = now
            self.end(workflow)
            return
        self._table.rest(workflow, now)
        if workflow.known:
            self._judge(workflow, now)
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
            if workflow.first_declared is not None:
                declared = workflow.agent.declared_calls
                declared.observe(*workflow.first_declared, workflow.calls_done)
            self._count_end(workflow)
            self._retention.on_end(workflow)
            self._counts.see(tally.TASK_S, workflow.idle_since - workflow.began_at)

    def _count_end(self, workflow: Workflow) -> None:
        """Its class learns that it has ended; once, unless it returns."""
        if not workflow.doubted:
            workflow.doubted = True
            self._count_calls(workflow)
            workflow.agent.observe_end_after(workflow.tool, workflow.calls_done)

    def _count_calls(self, workflow: Workflow) -> None:
        """Its class learns how far it has come, now that it is known whether it went on."""
        workflow.agent.observe_progress(workflow.calls_done, workflow.calls_counted)
        workflow.calls_counted = workflow.calls_done

    def review(self, now: float) -> None:
        """Judge the absences anew whose time it is."""
        while (due := self._reviews.take(now)) is not None:
            self._judge(due[1][0], now)

    def _judge(self, workflow: Workflow, now: float) -> None:
        """What an absence means by what is known now; and when it is judged again."""
        since = workflow.idle_since
        doubt, patience, way = self._limits_s(workflow)
        if now >= since + patience:
            self._take_leave(workflow)
            workflow.stale = True
            workflow.note(now, decisions.PRESUMED_ENDED, decisions.AWAY)
            return
        if now >= since + doubt:
            self._count_end(workflow)
            if workflow.resident:
                self._residency.update(workflow)
        again = judged_again_at(since, now, doubt, patience)
        idle = len(self._table.idle)
        self._reviews.add(again, (workflow, since), idle)
        if workflow.resident and way < patience and since + way != workflow.gives_way_at:
            workflow.gives_way_at = since + way
            self._ways.add(workflow.gives_way_at, (workflow, workflow.gives_way_at), idle)

    def note_busy(self, now: float) -> None:
        """The engine has something to run, or nothing is held."""
        self._busy_at = now

    def use_idle_engine(self, now: float) -> None:
        """There are held calls, and none that could run."""
        residents, idle_s = self._residency.residents, now - self._busy_at
        if residents and (self._price.known or idle_s >= _IDLE_ENGINE_S):
            cheapest = min(residents, key=self._price.again_s)
            if idle_s >= self._price.again_s(cheapest):
                self._leave(cheapest, decisions.IDLE_ENGINE, now)

    def give_way(self, blocks: int, now: float) -> None:
        """Residents who are away too long for their KV's worth leave, if that frees `blocks`."""
        leaving: list[tuple[float, _Way]] = []
        most = 0
        while most < blocks and (entry := self._ways.take(now)) is not None:
            leaving.append(entry)
            most += self._residency.promised_blocks(entry[1][0])
        for when, way in leaving:
            if most < blocks:
                self._ways.add(when, way, len(self._table.idle))
            else:
                self._leave(way[0], decisions.WORTH_LESS, now)

    def _limits_s(self, workflow: Workflow) -> tuple[float, float, float]:
        """Idle seconds after which its return is in doubt, its end presumed, and it gives way."""
        gaps = workflow.agent.gaps_after(workflow.tool)
        doubt, patience = gaps.patience_s(DOUBT), gaps.patience_s(self._give_up)
        break_even = self._price.break_even_s(workflow, len(self._residency.residents))
        hint = workflow.hint
        if hint is not None and hint.ttl_s is not None:
            patience = max(patience, hint.ttl_s)
        declared_s = _declared_gap_s(workflow)
        if declared_s is None or not workflow.agent.declared_gaps.believed:
            return doubt, patience, gaps.give_way_s(break_even)
        late_s = _LATE * declared_s
        way = 0.0 if declared_s > break_even else late_s
        return max(doubt, late_s), max(patience, late_s), way

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

    def _gives_way(self, way: _Way) -> bool:
        workflow, when = way
        return workflow.resident and workflow.gives_way_at == when


def _declared_gap_s(workflow: Workflow) -> float | None:
    """The gap its last call declared; None if it declared none."""
    if workflow.hint is None or workflow.hinted_at_calls != workflow.calls_done - 1:
        return None
    return workflow.hint.gap_s
