"""What a router knows: replicas, their reports, sessions, and the calls it has sent where.

Pure data, shared by placement.py and stealing.py, by the proxy and by the simulator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec

#: What an engine tells is not believed beyond this: sums of it are still exact.
MOST = 1 << 50
_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
_Amount = Annotated[float, msgspec.Meta(ge=0.0, le=float(MOST))]

SessionKey = tuple[str, str]
"""(tenant, session id): a session id means nothing outside its tenant."""


@dataclass(frozen=True, slots=True)
class HeldCall:
    """A call that an engine holds back: `new` if its session has computed nothing there yet."""

    tenant: str
    session: str
    new: bool
    held_s: _Amount
    tokens: _Count

    @property
    def key(self) -> SessionKey:
        return (self.tenant, self.session)


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What an engine says of itself (`GET /v1/saga/state`), or what its `/metrics` tell.

    at: when it was received, seconds of the router's clock.
    started: names this run of the engine; another value: it was restarted, and its KV is lost.
    kv_tokens, used_tokens: KV pool, and what residents hold or are about to (stock: in use).
    prefill_tokens_per_s: 0 where not known (stock vLLM).
    sessions: whose KV it keeps, as far as it says; held_calls: oldest first. Both are bounded.
    """

    at: float
    started: str
    kv_tokens: _Count
    used_tokens: _Count
    running: _Count
    waiting: _Count
    resident: _Count = 0
    prefill_tokens_per_s: _Amount = 0.0
    held_calls: tuple[HeldCall, ...] = ()
    sessions: tuple[SessionKey, ...] = ()

    @classmethod
    def from_state(cls, state: Mapping[str, Any], at: float) -> EngineReport:
        """What an engine answers to `STATE` (engine/control.py), received at `at`.

        Raises:
            msgspec.ValidationError: it is something else.
        """
        return msgspec.convert({**state, "at": at}, cls, strict=False)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call that needs a replica.

    session: None where the request has no identity. parent: the session that spawned it.
    prompt_tokens: as estimated by the router. prefix: hash of what many sessions share (system
    prompt and tools), None where there is none.
    """

    call_id: str
    session: SessionKey | None
    prompt_tokens: int
    prefix: int | None = None
    parent: SessionKey | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a call goes and why; `reason` is one of a small fixed set, fit for a metric label."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """A session changes its home. `call_ids`: its calls at the source that have not begun, which
    are to be withdrawn there and sent to `target`; empty if it has none (it moves with its next).

    The placer has counted them at `target` already: who carries the move out does not place them.
    saved_s: seconds of waiting it is expected to save; cost_s: of prefill that it takes.
    """

    session: SessionKey
    source: str
    target: str
    call_ids: tuple[str, ...]
    reason: str
    saved_s: float = 0.0
    cost_s: float = 0.0


class Placer(Protocol):
    """The router's brain: every policy (`saga`, `round_robin`, ...) is one. Pure, single-threaded.

    Times are seconds of one monotonic clock, given by the caller. Replicas are named by strings.
    """

    def add(self, replica: str) -> None:
        """A replica has joined; it accepts calls until `set_accepting` says otherwise."""

    def remove(self, replica: str) -> None:
        """A replica has left for good: its sessions have no home any more."""

    def set_accepting(self, replica: str, accepting: bool) -> None:
        """Whether calls may be sent there: false while it is down."""

    def set_draining(self, replica: str, draining: bool) -> None:
        """A draining replica serves the sessions it has, and gets no new ones."""

    def place(self, arrival: Arrival, now: float, exclude: Collection[str] = ()) -> Decision | None:
        """Choose a replica, and count the call as in flight there; None if none accepts.

        exclude: replicas that have just refused the call. A call placed again moves.
        """

    def on_first_byte(self, call_id: str, now: float) -> None:
        """The call is being answered: it cannot be moved any more."""

    def on_finish(self, call_id: str, now: float, total_tokens: int | None) -> None:
        """The call has ended; its context holds `total_tokens` (None: unknown, or it failed)."""

    def on_report(self, replica: str, report: EngineReport) -> None:
        """An engine has reported. A report with another `started` forgets who had KV there."""

    def end(self, session: SessionKey) -> None:
        """A session is over."""

    def epoch(self, now: float) -> Sequence[Move]:
        """Called every 100 ms: the sessions that change their home now."""
