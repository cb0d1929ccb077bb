"""Where each call of a deployment goes: the router's edge and placer, driven by Ray's events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_saga.ray.requests import Asked
from vllm_saga.router.edge import Edge, Recognised
from vllm_saga.router.fleet import EngineReport, Placer

#: Under which a replica's routing stats hold its engine's report, and its number.
REPORT = "saga"
NUMBER = "saga_number"
_EPOCH_S = 0.1


@dataclass(frozen=True, slots=True)
class Placed:
    """A call and where it goes. since: when it was placed, seconds. fresh: that was just now."""

    recognised: Recognised
    replica: str
    reason: str
    since: float
    fresh: bool = False


class Dispatch:
    """Keeps a `Placer` in step with the replicas that Ray knows, and with the calls they serve.

    Args:
        patience_s: so long a call is meant for the replica that was chosen although it takes
            none; then for another one.
        told_of_ends: whether `finished` will be called for each call; if not, a call counts as
            over once it is placed.
    """

    def __init__(
        self, placer: Placer, edge: Edge, patience_s: float, told_of_ends: bool = True
    ) -> None:
        self.placer = placer
        self._edge = edge
        self._patience_s = patience_s
        self._told_of_ends = told_of_ends
        self._numbers: dict[str, object] = {}
        self._open: dict[str, Placed] = {}
        self._epoch_at = 0.0

    def __len__(self) -> int:
        """Calls in flight."""
        return len(self._open)

    def update(self, replicas: Mapping[str, Mapping[str, Any]], now: float) -> None:
        """These replicas are there, by name, each with its routing stats: old ones or new.

        Raises:
            msgspec.ValidationError: what a replica reports cannot be read.
        """
        for name in self._numbers.keys() - replicas.keys():
            self.remove(name)
        for name in replicas.keys() - self._numbers.keys():
            self._numbers[name] = None
            self.placer.add(name)
        for name, stats in replicas.items():
            number = stats.get(NUMBER)
            if number is not None and number != self._numbers[name]:
                self._numbers[name] = number
                self.placer.on_report(name, EngineReport.from_state(stats[REPORT], now))

    def remove(self, replica: str) -> None:
        """It has died or left: nobody's KV is there any more."""
        if self._numbers.pop(replica, self) is not self:
            self.placer.remove(replica)

    def place(self, call_id: str, asked: Asked, now: float) -> Placed | None:
        """Where a call goes; None if there is no replica. It is asked again while none takes it."""
        if now - self._epoch_at >= _EPOCH_S:
            self._epoch_at = now
            # No call can be taken back from its replica, as each counts as begun: no moves.
            self.placer.epoch(now)
        before = self._open.get(call_id)
        if before is not None and self._still_meant(before, now):
            return before
        recognised = before.recognised if before else self._recognise(call_id, asked, now)
        exclude = (before.replica,) if before else ()
        decision = self.placer.place(recognised.arrival, now, exclude)
        if decision is None:
            return None
        self.placer.on_first_byte(call_id, now)
        placed = Placed(recognised, decision.replica, decision.reason, now)
        self._open[call_id] = placed
        if not self._told_of_ends:
            self.finished(call_id, decision.replica, now)
        return replace(placed, fresh=True)

    def finished(self, call_id: str, replica: str, now: float) -> None:
        """A call has ended at this replica; nothing if it has been placed elsewhere since."""
        placed = self._open.get(call_id)
        if placed is None or placed.replica != replica:
            return
        del self._open[call_id]
        arrival = placed.recognised.arrival
        # Answers are not seen here: what one adds to the context counts with the next prompt.
        self.placer.on_finish(call_id, now, arrival.prompt_tokens or None)
        if arrival.last and arrival.session is not None:
            self._edge.forget(arrival.session)

    def given_up(self, call_id: str, now: float) -> None:
        """A caller has gone before a replica took its call."""
        if self._open.pop(call_id, None) is not None:
            self.placer.on_finish(call_id, now, None)

    def _still_meant(self, placed: Placed, now: float) -> bool:
        waited_s = now - placed.since
        here = placed.replica in self._numbers
        return here and (waited_s < self._patience_s or len(self._numbers) == 1)

    def _recognise(self, call_id: str, asked: Asked, now: float) -> Recognised:
        return self._edge.recognise(call_id, asked.path, asked.headers, asked.body, now)
