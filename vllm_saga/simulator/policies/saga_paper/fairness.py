"""Agent Fair Share (Eqs 8 and 9 of the SAGA paper): whose calls go first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_saga.simulator.policies.saga_paper.formulas import SLO_FACTOR, urgency
from vllm_saga.simulator.policies.saga_paper.graph import Histories, Run
from vllm_saga.simulator.records import LiveSession


class AgentFairShare:
    """Ranks live sessions: tenants by the sum of their tasks' urgencies, then the tasks of each.

    urgency = remaining work / (deadline - now), both in seconds; an overdue task has the slack of
    one step left. Sessions of agents not known yet have none. Rank 0 goes first; equal urgencies
    share a rank, so that vLLM serves them in order of arrival.
    """

    def __init__(self, histories: Histories) -> None:
        self._histories = histories
        self._runs: dict[LiveSession, dict[str | None, Run]] = {}
        self._tasks: dict[LiveSession, _Task] = {}
        self._ranks: dict[LiveSession, int] = {}

    def runs(self, session: LiveSession) -> dict[str | None, Run]:
        """The agents of a live session that are at work, by name; call `progressed` after."""
        return self._runs.setdefault(session, {})

    def progressed(self, session: LiveSession) -> None:
        """An agent of the session has begun, made a step or ended: estimate what is left."""
        task = self._tasks.setdefault(session, _Task())
        runs = self._runs[session]
        known = {agent: self._histories.knowledge(run) for agent, run in runs.items()}
        main = known.get(None)
        if main is not None and task.deadline_s is None:
            task.deadline_s = session.arrival_s + SLO_FACTOR * main.expected_completion_s
        sure = [(kind, runs[agent].steps) for agent, kind in known.items() if kind is not None]
        task.remaining_s = sum(kind.work_left_s(steps) for kind, steps in sure)
        task.step_s = max((kind.step_work_s for kind, _ in sure), default=0.0)

    def end(self, session: LiveSession) -> None:
        for table in (self._runs, self._tasks, self._ranks):
            table.pop(session, None)

    def rank(self, session: LiveSession, now: float) -> int:
        """Its place as of the last `update`; a session that came since is ranked now."""
        if session not in self._ranks:
            self.update(now)
        return self._ranks[session]

    def update(self, now: float) -> None:
        """Rank all live sessions anew."""
        own = {session: task.urgency(now) for session, task in self._tasks.items()}
        tenants: dict[str, float] = defaultdict(float)
        for session, value in own.items():
            tenants[session.tenant] += value
        places = {s: (-tenants[s.tenant], -value) for s, value in own.items()}
        order = {place: rank for rank, place in enumerate(sorted(set(places.values())))}
        self._ranks = {session: order[place] for session, place in places.items()}


@dataclass(slots=True)
class _Task:
    """A session to Agent Fair Share, seconds: work left, mean work of a step, when it is due."""

    remaining_s: float = 0.0
    step_s: float = 0.0
    deadline_s: float | None = None

    def urgency(self, now: float) -> float:
        if self.deadline_s is None or not self.remaining_s:
            return 0.0
        return urgency(self.remaining_s, max(self.deadline_s - now, self.step_s))


def reorder(scheduler: Any, priorities: Mapping[str, int]) -> None:
    """Give calls in an engine new priorities, by request id; its queue follows."""
    moved = []
    for request_id, priority in priorities.items():
        request = scheduler.requests[request_id]
        if request.priority != priority:
            moved.append((request, priority))
    queued = {r for r, _ in moved if r.status is not RequestStatus.RUNNING}
    # The queue is a heap: what is to change its place must be out of it meanwhile.
    scheduler.waiting.remove_requests(queued)
    for request, priority in moved:
        request.priority = priority
    for request in queued:
        scheduler.waiting.add_request(request)
