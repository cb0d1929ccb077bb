"""Continuum: KV of a paused program stays pinned for as long as that is expected to pay."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_saga.policy.retention import TimeToLive
from vllm_saga.simulator.hardware import call_alone_s
from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread

#: What fills the gap after a call that invoked no tool.
NO_TOOL = ("human", "end")
_CLASS = 1 << 40


@dataclass(eq=False, slots=True)
class _Pin:
    """A finished call whose blocks are not freed yet, and until when (seconds)."""

    thread: Thread
    request: Any
    until_s: float


class _PinningMixin:
    """Frees the blocks of finished calls when their pins end."""

    pins: _Pins

    def _free_request_blocks(self, request: Any) -> Any:
        if not self.pins.keep(request):
            super()._free_request_blocks(request)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        request.priority -= _CLASS
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for new in output.scheduled_new_reqs:
            self.pins.scheduled(new.req_id)
        for call_id in output.scheduled_cached_reqs.resumed_req_ids:
            self.pins.resumed(call_id)
        return output

    def release(self, request: Any) -> None:
        """Free the blocks of a pin."""
        super()._free_request_blocks(request)  # type: ignore[misc]


class PinningScheduler(_PinningMixin, Scheduler):
    """Stock's synchronous scheduler with pins."""


class PinningAsyncScheduler(_PinningMixin, AsyncScheduler):
    """Stock's asynchronous scheduler with pins."""


class _Pins:
    """The pins of one engine."""

    def __init__(self, policy: Continuum, replica: int, scheduler: Any) -> None:
        self._policy = policy
        self._replica = replica
        self._scheduler = scheduler
        self._pins: dict[Thread, _Pin] = {}
        self._expiry: list[tuple[float, int, _Pin]] = []
        self._order = itertools.count()
        self._allocate = scheduler.kv_cache_manager.allocate_slots
        scheduler.kv_cache_manager.allocate_slots = self._allocate_or_unpin

    def __contains__(self, thread: Thread) -> bool:
        return thread in self._pins

    def keep(self, request: Any) -> bool:
        """Whether the blocks of this call stay pinned, now that they would be freed."""
        if request.status not in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
        ):
            return False
        call = self._policy.calls[request.request_id]
        self.release(call.thread)
        ttl = self._policy.ttl_s(call)
        if ttl <= 0:
            return False
        pin = _Pin(call.thread, request, self._policy.cluster.now() + ttl)
        self._pins[call.thread] = pin
        heapq.heappush(self._expiry, (pin.until_s, next(self._order), pin))
        return True

    def release(self, thread: Thread) -> None:
        pin = self._pins.pop(thread, None)
        if pin is not None:
            self._scheduler.release(pin.request)

    def expire(self, now: float) -> None:
        """End pins past their time; one whose next call waits here already stays for it."""
        while self._expiry and self._expiry[0][0] < now:
            _, _, pin = heapq.heappop(self._expiry)
            waiting = pin.thread.call
            if waiting is not None and waiting.replica == self._replica:
                continue
            if self._pins.get(pin.thread) is pin:
                self.release(pin.thread)

    @property
    def next_expiry_s(self) -> float:
        return self._expiry[0][0] if self._expiry else math.inf

    def scheduled(self, call_id: str) -> None:
        """A call has its blocks, and with them what was pinned for it."""
        call = self._policy.calls[call_id]
        self._policy.note_scheduled(call)
        self.release(call.thread)
        self.resumed(call_id)

    def resumed(self, call_id: str) -> None:
        # From here on it only ranks victims of preemption: latest program first.
        number = self._policy.calls[call_id].session.number
        self._scheduler.requests[call_id].priority = number

    def _allocate_or_unpin(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = self._allocate(request, *args, **kwargs)
        while blocks is None and not self._can_wait(request):
            own = self._policy.calls[request.request_id].thread
            if not self._pins:
                return None
            # Its own last: that holds more than the call can use where a context was edited.
            latest = max(self._pins, key=lambda thread: (thread is not own, thread.session.number))
            self.release(latest)
            self._policy.note_unpinned(latest)
            blocks = self._allocate(request, *args, **kwargs)
        return blocks

    def _can_wait(self, request: Any) -> bool:
        """Whether a call that finds no room has not begun, while others make progress."""
        return request.status != RequestStatus.RUNNING and bool(self._scheduler.running)


class Continuum(Policy):
    """A time to live for KV between the calls of a program, and first come first served by program.

    Source: arXiv 2511.02230 (v6: sections 4.1 to 4.3, Algorithm 1). The authors' public code,
    https://github.com/Hanchenli/vllm-continuum , lacks the paper's estimator; compared were two
    reconstructions: the plugin https://github.com/michiLXY03/vllm-continuum-plugin and the fork
    https://github.com/burninglhw/vllm-continuum (with an audit against v6).

    * When a call that invoked a tool has ended, its blocks stay pinned (not freed) for the time to
      live of `TimeToLive`; after the last call of a thread, or one without a tool (a human is to
      answer), there is no pin. A pin ends when the next call of its thread has taken its blocks
      over, and at its time, unless that call waits at the engine by then.
    * Who waits is ordered: preempted calls, calls whose context is pinned, others; by arrival of
      the program within each. A new call waits while running and pinned KV leave no room.
    * If nothing could run otherwise, or a running call finds no room, pins end early: those of the
      latest program first. Victims of preemption are calls of the latest program, too.

    The pins are real: vLLM counts their blocks as in use, so the simulator's KV accounts show them
    as running, not as cached. That new calls wait for pins, as in the authors' rule, is what makes
    it strong: with pins that yield to whoever needs room (as in the plugin), or a mere order of
    eviction, it took twice as long here. Waiting order is vLLM's own priority scheduling.

    Deviations from the original:

    * A program here may have several threads at once (sub-agents), each with its own pin; the
      original supports one call at a time. Only favours it.
    * Seconds to compute a context again are exact (the cost model of the simulated engine), where
      the original fits a curve. Gaps, waits and lengths are pooled over all engines.
    * Unpublished choices: the mean wait is taken over the last 256 calls of known threads that came
      without a pin, from arrival to being scheduled; η counts every program that has ended.
    * A call whose pin ends early while it waits keeps its place in line.
    """

    ordering = "priority"

    def __init__(self, cluster: ClusterView) -> None:
        super().__init__(cluster)
        self.calls: dict[str, LiveCall] = {}
        self._time_to_live = TimeToLive()
        self._pins: list[_Pins] = []
        self._unpinned: set[str] = set()

    def scheduler_class(self, overlapping: bool) -> type | None:
        return PinningAsyncScheduler if overlapping else PinningScheduler

    def attach(self, replica: int, scheduler: Any) -> None:
        scheduler.pins = _Pins(self, replica, scheduler)
        self._pins.append(scheduler.pins)

    def before_step(self, replica: int, scheduler: Any) -> None:
        self._pins[replica].expire(self.cluster.now())

    def acts_at(self, replica: int, scheduler: Any) -> float:
        return self._pins[replica].next_expiry_s

    def on_submit(self, call: LiveCall) -> None:
        self.calls[call.id] = call
        last = call.thread.last
        if last is None or last.finished_s is None:
            return
        if _invokes_tool(last):
            self._time_to_live.saw_gap(_tool(last), call.issued_s - last.finished_s)
        if call.thread not in self._pins[call.replica]:
            self._unpinned.add(call.id)

    def priority(self, call: LiveCall) -> int:
        pinned = call.thread in self._pins[call.replica]
        return call.session.number + (0 if pinned else _CLASS)

    def on_finish(self, call: LiveCall) -> None:
        del self.calls[call.id]
        if call.thread.ended:
            self._pins[call.replica].release(call.thread)

    def on_session_end(self, session: LiveSession) -> None:
        self._time_to_live.saw_end(session.calls_done)
        for pins in self._pins:
            for thread in session.threads.values():
                pins.release(thread)

    def ttl_s(self, call: LiveCall) -> float:
        """For how long to pin what a call that has just ended leaves behind."""
        if not _invokes_tool(call):
            return 0.0
        reload_s = call_alone_s(self.cluster.hardware, call.spec.context_tokens, 0, 1)
        return self._time_to_live.seconds(_tool(call), reload_s)

    def note_scheduled(self, call: LiveCall) -> None:
        """A call is scheduled for the first time."""
        if call.id in self._unpinned:
            self._unpinned.remove(call.id)
            self._time_to_live.saw_wait(self.cluster.now() - call.submitted_s)

    def note_unpinned(self, thread: Thread) -> None:
        """A pin ended early; the next call of its thread may wait already."""
        if thread.call is not None:
            self._unpinned.add(thread.call.id)


def _invokes_tool(call: LiveCall) -> bool:
    return call.spec.gap not in NO_TOOL


def _tool(call: LiveCall) -> str:
    return call.spec.tool or call.spec.gap or "tool"
