"""The router's own placement and stealing (vllm_saga/router) over simulated engines."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from vllm_saga.engine.control import STATE
from vllm_saga.router.fleet import Arrival, EngineReport, Placer
from vllm_saga.router.placement import SagaPlacer, Settings
from vllm_saga.simulator.records import LiveCall
from vllm_saga.simulator.replica import Replica
from vllm_saga.simulator.routing import Placement, RouterView

_REPORT_S = 0.5
_EPOCH_S = 0.1


class Routed(Placement):
    """Asks a `Placer` as the proxy does: epochs every 100 ms, reports of the engines every 0.5 s.

    It sees a call begin when the engine schedules it, where the proxy has to wait for the first
    byte, and it knows the length of a prompt exactly. It is not told of ends.
    """

    tick_s = _EPOCH_S

    def __init__(self, placer: Placer) -> None:
        self.placer = placer
        self._view: RouterView | None = None
        self._open: dict[str, LiveCall] = {}
        self._report_due_s = 0.0

    def attach(self, view: RouterView) -> None:
        self._view = view
        for index in range(len(view.replicas)):
            self.placer.add(str(index))
        self._report(view)

    def __call__(self, call: LiveCall, loads: Sequence[int]) -> int:
        decision = self.placer.place(arrival_of(call), self._seen().now())
        if decision is None:
            raise RuntimeError(f"no engine for call {call.id}")
        self._open[call.id] = call
        return int(decision.replica)

    def on_finish(self, call: LiveCall) -> None:
        now = self._seen().now()
        if self._open.pop(call.id, None) is not None:
            self.placer.on_first_byte(call.id, now)
        self.placer.on_finish(call.id, now, call.spec.context_tokens)

    def on_tick(self) -> None:
        view = self._seen()
        now = view.now()
        for call in [call for call in self._open.values() if call.cached_tokens >= 0]:
            self.placer.on_first_byte(call.id, now)
            del self._open[call.id]
        if now >= self._report_due_s:
            self._report(view)
        for move in self.placer.epoch(now):
            for call_id in move.call_ids:
                self._carry_out(view, self._open[call_id], int(move.target))

    def _carry_out(self, view: RouterView, call: LiveCall, target: int) -> None:
        if view.move(call, target):
            self.moves += 1
        else:
            # It has begun meanwhile: its session stays.
            others = {str(index) for index in range(len(view.replicas))} - {str(call.replica)}
            self.placer.place(arrival_of(call), view.now(), others)

    def _report(self, view: RouterView) -> None:
        now = view.now()
        self._report_due_s = now + _REPORT_S
        for index, replica in enumerate(view.replicas):
            self.placer.on_report(str(index), report_of(replica, now))

    def _seen(self) -> RouterView:
        if self._view is None:
            raise RuntimeError("attach the placement to a cluster first")
        return self._view


def arrival_of(call: LiveCall) -> Arrival:
    """What a proxy would know of a call."""
    session = call.session
    shared = session.trace.shared_prefix
    prefix = None
    if shared is not None:
        prefix = int.from_bytes(blake2b(shared.group.encode(), digest_size=8).digest())
    return Arrival(call.id, (session.tenant, session.id), call.spec.prompt_tokens, prefix)


def report_of(replica: Replica, now: float) -> EngineReport:
    """What an engine says of itself: saga's own report, or of stock vLLM what its metrics tell."""
    scheduler = replica.scheduler
    if not hasattr(scheduler, "saga_control"):
        running, waiting = scheduler.get_request_counts()
        used, _ = replica.kv_tokens()
        return EngineReport(now, "stock", replica.hardware.kv_tokens, used, running, waiting)
    return EngineReport.from_state(scheduler.saga_control(STATE, {}), now)


def saga_router() -> Placement:
    """What `vllm-saga router --policy saga` runs."""
    return Routed(SagaPlacer())


def saga_router_without_stealing() -> Placement:
    """The same, but sessions never move."""
    return Routed(SagaPlacer(Settings(stealing=None)))
