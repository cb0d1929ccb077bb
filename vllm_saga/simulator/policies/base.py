"""What a policy under test may decide, with stock vLLM's answer to each question."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_saga.simulator.records import LiveCall, LiveSession

if TYPE_CHECKING:
    from vllm_saga.simulator.hardware import Hardware


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What a policy may see of the cluster, and what it may do to it.

    replicas: number of engines. kv_tokens: KV pool of one engine, in tokens. hardware: cost model
    of one engine. now: the virtual clock, seconds. in_flight: calls at each engine, running or
    waiting. kv_in_use: tokens of KV of an engine's calls in flight, and free but still cached.
    submit: send a call that `admit` has held to its engine (`Policy.replica_for` or the placement
    chooses it). move: send a call that its engine has not begun to another engine; False if it has.
    """

    replicas: int
    kv_tokens: int
    hardware: Hardware
    now: Callable[[], float]
    in_flight: Callable[[], list[int]]
    kv_in_use: Callable[[int], tuple[int, int]]
    submit: Callable[[LiveCall], None]
    move: Callable[[LiveCall, int], bool]


class Policy:
    """One way to run the cluster. This one changes nothing: vLLM, first come first served.

    A policy is made anew for every run and sees every event of every replica. It must decide from
    what has happened; only the offline references may look at `session.trace` beyond the calls
    already issued.
    """

    #: vLLM's own `--scheduling-policy`: "fcfs" or "priority".
    ordering = "fcfs"
    #: Seconds between two `on_tick`; None: never.
    tick_s: float | None = None
    #: Whether nothing but calls that come and end changes what it wants of calls that decode.
    cruises = True
    #: Whether requests carry a session id into the engine.
    sends_session_id = False

    def __init__(self, cluster: ClusterView) -> None:
        self.cluster = cluster

    def scheduler_class(self, overlapping: bool) -> type | None:
        """The scheduler class of every engine; None: stock's."""
        return None

    def attach(self, replica: int, scheduler: Any) -> None:
        """The scheduler of an engine has been made."""

    def admit(self, call: LiveCall) -> bool:
        """A call was issued. False holds it: the policy must `cluster.submit` it later."""
        return True

    def replica_for(self, call: LiveCall) -> int | None:
        """The engine a call goes to; None leaves it to the placement."""
        return None

    def priority(self, call: LiveCall) -> int:
        """Request priority as in vLLM (lower runs sooner), where `ordering` is "priority"."""
        return 0

    def extra_args(self, call: LiveCall) -> dict[str, Any] | None:
        """`vllm_xargs` of the request."""
        return None

    def on_submit(self, call: LiveCall) -> None:
        """A call is on its way to an engine (`call.replica`)."""

    def before_step(self, replica: int, scheduler: Any) -> None:
        """An engine is about to schedule."""

    def acts_at(self, replica: int, scheduler: Any) -> float:
        """When, on the clock, an engine may let in who waits though nothing has come or ended."""
        return math.inf

    def on_finish(self, call: LiveCall) -> None:
        """A call has ended (`call.finished_s`)."""

    def on_session_end(self, session: LiveSession) -> None:
        """The last call of a session has ended."""

    def on_tick(self) -> None:
        """`tick_s` seconds have passed."""
