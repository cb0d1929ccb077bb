"""What a placement is told of the cluster, and what it may do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_saga.simulator.records import LiveCall
from vllm_saga.simulator.replica import Replica


@dataclass(frozen=True, slots=True)
class RouterView:
    """The cluster as a router sees it.

    replicas: the engines, of which only what they report may be used. now: the virtual clock,
    seconds. move: send a call that its engine has not begun to another engine; False if it has.
    """

    replicas: Sequence[Replica]
    now: Callable[[], float]
    move: Callable[[LiveCall, int], bool]


class Placement:
    """Says which engine a call goes to. Made anew for every run."""

    #: Seconds between two `on_tick`; None: never.
    tick_s: float | None = None
    #: Calls that were moved to another engine.
    moves = 0

    def attach(self, view: RouterView) -> None:
        """The cluster has been made."""

    def __call__(self, call: LiveCall, loads: Sequence[int]) -> int:
        """The engine of `call`; loads: calls in flight by engine."""
        raise NotImplementedError

    def on_finish(self, call: LiveCall) -> None:
        """A call has ended (`call.finished_s`)."""

    def on_tick(self) -> None:
        """`tick_s` seconds have passed."""


class Choice(Placement):
    """A placement that needs to know nothing but the calls in flight."""

    def __init__(self, choose: Callable[[LiveCall, Sequence[int]], int]) -> None:
        self._choose = choose

    def __call__(self, call: LiveCall, loads: Sequence[int]) -> int:
        return self._choose(call, loads)
