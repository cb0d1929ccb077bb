"""The simulation: sessions on lanes or by arrival, engines, one policy, one virtual clock."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_saga.simulator import trace
from vllm_saga.simulator.content import CallContent, SessionContent
from vllm_saga.simulator.hardware import Hardware
from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread
from vllm_saga.simulator.replica import Replica
from vllm_saga.simulator.routing import Placement, RouterView
from vllm_saga.simulator.schedulers import make_scheduler

Event = Callable[[], None]
# At one moment: calls arrive, then policies look around, then engines schedule.
_CALLS, _TICKS, _ENGINES = range(3)
_SAMPLES = 400
# Longer than any policy's own limit on a hold.
_STUCK_S = 7200.0


class Stuck(RuntimeError):
    """Calls are left, but nothing will ever happen again: a policy has forgotten them."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run needs besides its policy. `arrivals_s` (open loop) or `lanes` (closed loop).

    cruises: stretches of pure decode may be scheduled at once (cruise.py).
    """

    sessions: Sequence[trace.Session]
    hardware: Hardware
    placement: Callable[[], Placement]
    lanes: int | None = None
    arrivals_s: Sequence[float] | None = None
    replicas: int = 1
    overlapping: bool = True
    cruises: bool = True
    knobs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Progress:
    """Where a live session stands: unfinished dependencies by call."""

    session: LiveSession
    content: SessionContent
    waiting_for: list[int]
    followers: list[list[int]]


class Cluster:
    """Runs a `Setup` under one policy to its end (`run`), or until `until_s`."""

    def __init__(
        self,
        setup: Setup,
        make_policy: Callable[[ClusterView], Policy],
        on_progress: Callable[[int, float], None] = lambda done, now: None,
    ) -> None:
        self.setup = setup
        self.now = 0.0
        self.sessions: list[LiveSession] = []
        self.timeline: list[tuple[float, float, float]] = []
        self._advances, self._sample_every = 0, 1
        self._on_progress = on_progress
        self.placement = setup.placement()
        self._events: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()
        self._progress: dict[str, _Progress] = {}
        self._left = len(setup.sessions)
        self.policy = make_policy(
            ClusterView(
                replicas=setup.replicas,
                kv_tokens=setup.hardware.kv_tokens,
                hardware=setup.hardware,
                now=lambda: self.now,
                in_flight=self._in_flight,
                kv_in_use=self._kv_in_use,
                submit=self._submit,
                move=self._move,
            )
        )
        self.replicas = [self._make_replica(index) for index in range(setup.replicas)]
        self._due = [math.inf] * setup.replicas
        self.placement.attach(RouterView(self.replicas, lambda: self.now, self._move))

    def run(self, until_s: float = math.inf) -> None:
        """Run to the end; raises `Stuck` if a policy holds calls for ever."""
        self._start()
        for ticking in (self.policy, self.placement):
            if ticking.tick_s:
                self._tick_later(ticking)
        last_s = 0.0
        while self._left and self._events:
            when, kind, _, event = heapq.heappop(self._events)
            if when > until_s:
                return
            if kind != _TICKS:
                last_s = when
            elif when - last_s > _STUCK_S and self._only_ticks():
                break
            self.now = when
            event()
        if self._left:
            raise Stuck(f"{self._left} sessions are left and nothing is due: {self.policy}")

    def _only_ticks(self) -> bool:
        """Whether nothing runs and nothing is due, long gaps of agents included."""
        return not any(self._in_flight()) and all(kind == _TICKS for _, kind, *_ in self._events)

    # -- sessions -------------------------------------------------------------------------------

    def _start(self) -> None:
        setup = self.setup
        if setup.arrivals_s is not None:
            for number, when in enumerate(setup.arrivals_s[: len(setup.sessions)]):
                self._at(when, _CALLS, lambda number=number: self._begin(number, None))  # type: ignore[misc]
            return
        self._next_number = itertools.count()
        for lane in range(min(setup.lanes or 1, len(setup.sessions))):
            self._begin(next(self._next_number), lane)

    def _begin(self, number: int, lane: int | None) -> None:
        described = self.setup.sessions[number]
        session = LiveSession(described.session_id, described, number, self.now, lane)
        session.calls = [None] * len(described.calls)
        self.sessions.append(session)
        followers: list[list[int]] = [[] for _ in described.calls]
        for index, deps in enumerate(described.deps):
            for dep in set(deps):
                followers[dep].append(index)
        progress = _Progress(
            session,
            SessionContent(session, self.setup.hardware.block_size),
            [len(set(deps)) for deps in described.deps],
            followers,
        )
        self._progress[session.id] = progress
        for index, count in enumerate(progress.waiting_for):
            if not count:
                self._issue_later(progress, index)

    def _issue_later(self, progress: _Progress, index: int) -> None:
        delay = progress.session.trace.delays_s[index]
        self._at(self.now + delay, _CALLS, lambda: self._issue(progress.session, index))

    def _issue(self, session: LiveSession, index: int) -> None:
        agent = session.trace.calls[index].agent
        thread = session.threads.get(agent)
        if thread is None:
            thread = session.threads[agent] = Thread(session, agent)
        call = LiveCall(f"{session.id}#{index}", thread, index, self.now)
        session.calls[index] = thread.call = call
        hardware = self.setup.hardware
        request_s = hardware.request_s
        if hardware.contention_s:
            request_s += hardware.contention_s * sum(self._in_flight()) / self.setup.replicas
        if request_s:
            self._at(self.now + request_s, _CALLS, lambda: self._admit(call))
        else:
            self._admit(call)

    def _admit(self, call: LiveCall) -> None:
        if self.policy.admit(call):
            self._submit(call)

    def _submit(self, call: LiveCall) -> None:
        chosen = self.policy.replica_for(call)
        if chosen is None:
            chosen = self.placement(call, self._in_flight())
        content = self._progress[call.session.id].content.call(call.index)
        self._send(call, content, chosen)

    def _send(self, call: LiveCall, content: CallContent, replica: int) -> None:
        call.replica, call.submitted_s = replica, self.now
        self.policy.on_submit(call)
        ids: dict[str, Any] = {}
        if self.policy.sends_session_id:
            ids = {"session_id": call.session.id, "cache_salt": call.session.tenant or None}
        self.replicas[replica].submit(
            call,
            content,
            self.now,
            priority=self.policy.priority(call),
            extra_args=self.policy.extra_args(call),
            **ids,
        )
        self._wake(replica)

    def _move(self, call: LiveCall, to: int) -> bool:
        source = call.replica
        self.replicas[source].settle(self.now)
        self._wake(source)
        if call.cached_tokens >= 0 or source == to:
            return False
        self._send(call, self.replicas[source].withdraw(call), to)
        return True

    def _kv_in_use(self, replica: int) -> tuple[int, int]:
        self.replicas[replica].settle(self.now)
        self._wake(replica)
        return self.replicas[replica].kv_tokens()

    def _in_flight(self) -> list[int]:
        return [replica.calls_in_flight for replica in self.replicas]

    def _finished(self, call: LiveCall) -> None:
        session, thread = call.session, call.thread
        session.calls_done += 1
        thread.last = call
        if thread.call is call:
            thread.call = None
        calls = session.trace.calls
        thread.ended = all(c.agent != thread.agent for c in calls[call.index + 1 :])
        self.policy.on_finish(call)
        self.placement.on_finish(call)
        progress = self._progress[session.id]
        for index in progress.followers[call.index]:
            progress.waiting_for[index] -= 1
            if not progress.waiting_for[index]:
                self._issue_later(progress, index)
        if session.calls_done == len(calls):
            self._end(session)

    def _end(self, session: LiveSession) -> None:
        session.finished_s = self.now
        del self._progress[session.id]
        self.policy.on_session_end(session)
        self._left -= 1
        self._on_progress(len(self.setup.sessions) - self._left, self.now)
        if session.lane is not None:
            number = next(self._next_number)
            if number < len(self.setup.sessions):
                self._at(self.now, _CALLS, lambda: self._begin(number, session.lane))

    # -- clock ----------------------------------------------------------------------------------

    def _at(self, when: float, kind: int, event: Event) -> None:
        heapq.heappush(self._events, (when, kind, next(self._order), event))

    def _tick_later(self, ticking: Policy | Placement) -> None:
        self._at(self.now + (ticking.tick_s or math.inf), _TICKS, lambda: self._tick(ticking))

    def _tick(self, ticking: Policy | Placement) -> None:
        ticking.on_tick()
        self._tick_later(ticking)

    def _wake(self, index: int) -> None:
        """Have the engine advanced when it is due."""
        due = self.replicas[index].due_s
        if due < self._due[index]:
            self._due[index] = due
            self._at(due, _ENGINES, lambda: self._advance(index, due))

    def _advance(self, index: int, due: float) -> None:
        # An earlier event may have replaced this one.
        if self._due[index] != due:
            return
        self._due[index] = math.inf
        self.replicas[index].advance(self.now)
        self._wake(index)
        if index == 0:
            self._sample()

    def _sample(self) -> None:
        """Keep between 200 and 400 evenly spread samples of the pools."""
        self._advances += 1
        if self._advances % self._sample_every:
            return
        tokens = [replica.kv_tokens() for replica in self.replicas]
        running, cached = (sum(column) for column in zip(*tokens, strict=True))
        self.timeline.append((self.now, running, cached))
        if len(self.timeline) > _SAMPLES:
            self.timeline = self.timeline[::2]
            self._sample_every *= 2

    # -- engines --------------------------------------------------------------------------------

    def _make_replica(self, index: int) -> Replica:
        setup, hardware, policy = self.setup, self.setup.hardware, self.policy
        longest = max(
            (call.context_tokens for session in setup.sessions for call in session.calls), default=1
        )
        if longest > hardware.kv_tokens:
            raise ValueError(
                f"a call of {longest} tokens does not fit the KV pool of {hardware.kv_tokens}"
            )
        kind = policy.scheduler_class(setup.overlapping) or "stock"
        scheduler = make_scheduler(
            kind,
            blocks=hardware.kv_tokens // hardware.block_size + 1,
            overlapping=setup.overlapping,
            policy=policy.ordering,
            max_num_seqs=hardware.max_num_seqs,
            max_num_batched_tokens=hardware.max_num_batched_tokens,
            max_model_len=longest + 1,
            block_size=hardware.block_size,
            saga=setup.knobs,
            log_stats=False,
        )
        policy.attach(index, scheduler)
        return Replica(
            scheduler,
            hardware,
            overlapping=setup.overlapping,
            cruises=policy.cruises and setup.cruises,
            on_finish=self._finished,
            before_step=lambda: policy.before_step(index, scheduler),
            acts_at=lambda: policy.acts_at(index, scheduler),
        )
