"""Autellix: the program that has been served least goes first."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.records import LiveCall, LiveSession


@dataclass(eq=False, slots=True)
class _Program:
    """Seconds of service on the longest path of its calls, and seconds that its calls waited."""

    served_s: float = 0.0
    waited_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Active:
    """A call at an engine.

    inherited_s: its program's service when it came. waited_s, served_s: its own, up to `since`,
    when it last began to wait or to run. stint counts those changes.
    """

    call: LiveCall
    program: _Program
    level: int
    inherited_s: float
    since: float
    waited_s: float = 0.0
    served_s: float = 0.0
    running: bool = False
    stint: int = 0


class _PlasMixin:
    """Tells the policy which calls began or ceased to run in a step."""

    plas: Plas

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for call_id in output.preempted_req_ids or ():
            self.plas.note_preempted(call_id)
        for new in output.scheduled_new_reqs:
            self.plas.note_running(new.req_id)
        for call_id in output.scheduled_cached_reqs.resumed_req_ids:
            self.plas.note_running(call_id)
        return output


class PlasScheduler(_PlasMixin, Scheduler):
    """Stock's synchronous scheduler, watched."""


class PlasAsyncScheduler(_PlasMixin, AsyncScheduler):
    """Stock's asynchronous scheduler, watched."""


class Plas(Policy):
    """Least attained service by program, in levels, with promotion against starvation.

    Source: Autellix, arXiv 2502.13965, section 4.2 and Algorithm 1 (no code of the authors is
    public; independent ones for vLLM, whose reading was compared:
    https://github.com/kungfu-team/autellix , https://github.com/Crystalclear9/Autellix ).

    * A call inherits its program's attained service: the seconds that its earlier calls ran. With
      sub-agents, the longest path: at its end a call sets it to max(it, what the call inherited +
      the seconds it ran). For one thread this is the sum: PLAS; else it is ATLAS as Algorithm 1
      learns it, without being told the graph.
    * Levels have quanta `quantum_s` × `growth`^level; a call enters the level that its inherited
      service falls into, first come first served within it, and sinks by one when it has run for
      the level's quantum.
    * A waiting call whose program has waited `beta` times as long as it was served (its earlier
      calls and this one together) rises to the top level; its own wait starts anew.
    * Levels are vLLM priorities: who is admitted first, and who is preempted last.

    Deviations from the original:

    * A running call is preempted only when KV memory runs out (the highest level, latest arrival
      first), never merely because a call of a better level waits. Autellix swaps to host memory
      with its own kernels; without them a preemption recomputes everything, so this favours it.
    * Service is the time from being scheduled to the end, by the clock of the engine; the original
      counts the same in decode steps or seconds.
    * Several engines: the run's placement decides. Autellix sends calls of more than 2,048 tokens
      to their program's engine (as `least_loaded` does) and others to the least loaded one.
    * Quanta, number of levels and beta are not published. Ours are the best of those tried on
      development traces: first quantum 1 to 256 s, growth 1.5 to 4, beta 0.5 to never.
    """

    ordering = "priority"
    cruises = False

    def __init__(
        self,
        cluster: ClusterView,
        *,
        quantum_s: float = 64.0,
        growth: float = 2.0,
        levels: int = 8,
        beta: float = 8.0,
    ) -> None:
        super().__init__(cluster)
        self._quanta = [quantum_s * growth**level for level in range(levels)]
        self._bounds = list(itertools.accumulate(self._quanta[:-1]))
        self._beta = beta
        self._programs: dict[str, _Program] = {}
        self._active: dict[str, _Active] = {}
        # Per engine: when which call may sink or rise, if it is still in the same stint then.
        self._due: list[list[tuple[float, int, _Active, int]]] = [
            [] for _ in range(cluster.replicas)
        ]
        self._order = itertools.count()

    def scheduler_class(self, overlapping: bool) -> type | None:
        return PlasAsyncScheduler if overlapping else PlasScheduler

    def attach(self, replica: int, scheduler: Any) -> None:
        scheduler.plas = self

    def on_submit(self, call: LiveCall) -> None:
        program = self._programs.setdefault(call.session.id, _Program())
        level = bisect_right(self._bounds, program.served_s)
        now = self.cluster.now()
        active = self._active[call.id] = _Active(call, program, level, program.served_s, now)
        self._watch(active)

    def priority(self, call: LiveCall) -> int:
        return self._active[call.id].level

    def note_running(self, call_id: str) -> None:
        """The call runs from now on."""
        active = self._active[call_id]
        self._turn(active, running=True)
        self._watch(active)

    def note_preempted(self, call_id: str) -> None:
        """The call waits again."""
        active = self._active[call_id]
        self._turn(active, running=False)
        self._watch(active)

    def before_step(self, replica: int, scheduler: Any) -> None:
        due, now = self._due[replica], self.cluster.now()
        while due and due[0][0] <= now:
            _, _, active, stint = heapq.heappop(due)
            if active.stint != stint:
                continue
            request = scheduler.requests[active.call.id]
            if active.running:
                active.level += 1
                request.priority = active.level
                self._watch(active)
            else:
                # The queue is a heap: what changes its key must leave it first.
                scheduler.waiting.remove_request(request)
                active.level = request.priority = 0
                active.waited_s, active.since = 0.0, now
                scheduler.waiting.add_request(request)

    def on_finish(self, call: LiveCall) -> None:
        active = self._active.pop(call.id)
        self._turn(active, running=False)
        program = active.program
        program.served_s = max(program.served_s, active.inherited_s + active.served_s)
        program.waited_s += active.waited_s

    def on_session_end(self, session: LiveSession) -> None:
        del self._programs[session.id]

    def _turn(self, active: _Active, *, running: bool) -> None:
        """Close the stint; the next one waits or runs."""
        now = self.cluster.now()
        if active.running:
            active.served_s += now - active.since
        else:
            active.waited_s += now - active.since
        active.running, active.since = running, now
        active.stint += 1

    def _watch(self, active: _Active) -> None:
        """Note when the call sinks (if it goes on running) or rises (if it goes on waiting)."""
        if active.running:
            if active.level == len(self._quanta) - 1:
                return
            after = self._quanta[active.level]
        else:
            if active.level == 0:
                return
            served = active.program.served_s + active.served_s
            after = self._beta * served - active.program.waited_s - active.waited_s
        entry = (self.cluster.now() + after, next(self._order), active, active.stint)
        heapq.heappush(self._due[active.call.replica], entry)
