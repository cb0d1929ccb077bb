"""How many calls workflows make before they end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from vllm_saga.policy.records import NUM_LENGTH_BINS as _NUM_BINS
from vllm_saga.policy.records import LengthRecord

_GROWTH = 1.25
_FORGET_AT = 500.0
_BACK_OFF_WEIGHT = 4.0
# Agents make 43 calls in the median (vLLM, "AgentX", September 2026): to start from, an exponential
# distribution around so many ...
_PRIOR_CALLS = 40.0
# ... but who has come far goes far: at most so large a chance to end within a bin.
_PRIOR_MOST = 0.6
_SUREST = 0.99

#: Calls at which the bins begin.
_EDGES = tuple(_GROWTH**index for index in range(_NUM_BINS + 1))
_PRIOR = tuple(
    min(1.0 - math.exp((low - high) / _PRIOR_CALLS), _PRIOR_MOST) for low, high in pairwise(_EDGES)
)


def _bin(calls: float) -> int:
    return min(int(math.log(max(calls, 1.0)) / math.log(_GROWTH)), _NUM_BINS - 1)


class LengthModel:
    """The chance to end by calls made, of the workflows of one agent class.

    A hazard per bin of calls (25 % wide, up to about 3,000 calls): ends over workflows that came so
    far. Those still running count for as far as they have come (Kaplan & Meier 1958): what ends
    first is short, and would mislead. Halved every 500 ends. Little evidence is completed by
    `parent`, at the weight of four workflows, as in `GapModel`.
    """

    def __init__(self, parent: LengthModel | None = None) -> None:
        self._parent = parent
        self._reached = [0.0] * _NUM_BINS
        self._ended = [0.0] * _NUM_BINS
        self._ends = 0.0
        self._version = 0
        self._summed: tuple[int, list[float]] = (-1, [])

    def observe_call(self, calls: int, counted: int | None = None) -> None:
        """A workflow has made its `calls`-th call; its first `counted` have been observed, by
        default all before.
        """
        if counted is None:
            counted = calls - 1
        if calls <= counted:
            return
        if self._parent is not None:
            self._parent.observe_call(calls, counted)
        first = _bin(counted) + 1 if counted else 0
        for index in range(first, _bin(calls) + 1):
            self._reached[index] += 1.0
            self._version += 1

    def observe_end(self, calls: int) -> None:
        """A workflow ended after `calls` calls."""
        if self._parent is not None:
            self._parent.observe_end(calls)
        self._ended[_bin(calls)] += 1.0
        self._ends += 1.0
        self._version += 1
        if self._ends > _FORGET_AT:
            self._reached = [count * 0.5 for count in self._reached]
            self._ended = [count * 0.5 for count in self._ended]
            self._ends *= 0.5

    def retract_end(self, calls: int) -> None:
        """A workflow said to have ended after `calls` calls has not."""
        if self._parent is not None:
            self._parent.retract_end(calls)
        index = _bin(calls)
        still = min(self._ended[index], 1.0)
        self._ended[index] -= still
        self._ends -= still
        self._version += 1

    @property
    def evidence(self) -> float:
        """What was seen of this class, over that and the weight of its parent: 0 to 1."""
        return self._ends / (self._ends + _BACK_OFF_WEIGHT)

    def survival(self, done: int, more: Sequence[float]) -> list[float]:
        """Chance that a workflow which made `done` calls and has not ended makes so many more."""
        hazard = self._cumulative()
        now = _at(hazard, done)
        return [math.exp(now - _at(hazard, done + calls)) for calls in more]

    def remaining(self, done: int) -> float:
        """Calls expected of a workflow that has made `done` and has not ended; at least 1."""
        return self.remaining_moments(done)[0]

    def remaining_moments(self, done: int) -> tuple[float, float]:
        """Mean and variance of the calls left to a workflow that made `done` and has not ended."""
        hazard = self._cumulative()
        now = _at(hazard, done)
        mean = squares = low = 0.0
        alive = 1.0
        for index in range(_bin(done), _NUM_BINS):
            high = _EDGES[index + 1] - done
            still = math.exp(now - hazard[index + 1])
            # The integral of the chance to be alive, and of twice the calls times it.
            rate = math.log(alive / still) / (high - low)
            if rate > 1e-9:
                mean += (alive - still) / rate
                squares += 2.0 * (low * alive - high * still + (alive - still) / rate) / rate
            else:
                mean += (high - low) * alive
                squares += (high * high - low * low) * alive
            low, alive = high, still
            if alive < 1e-6:
                break
        return max(mean, 1.0), max(squares - mean * mean, 0.0)

    def record(self) -> LengthRecord:
        """All there is to know but for the parent, for `restore`."""
        return LengthRecord(tuple(self._reached), tuple(self._ended))

    def restore(self, record: LengthRecord) -> None:
        self._reached, self._ended = list(record.reached), list(record.ended)
        self._ends = sum(record.ended)
        self._version += 1

    def _hazards(self) -> list[float]:
        """Chance to end within each bin, of those who reach it."""
        before = _PRIOR if self._parent is None else self._parent._hazards()
        weight = _BACK_OFF_WEIGHT
        return [
            min((ended + weight * prior) / (max(reached, ended) + weight), _SUREST)
            for reached, ended, prior in zip(self._reached, self._ended, before, strict=True)
        ]

    def _cumulative(self) -> list[float]:
        """Cumulative hazard at the edges of the bins."""
        version = self._version + (self._parent._version if self._parent else 0)
        if self._summed[0] != version:
            logs = (-math.log(1.0 - hazard) for hazard in self._hazards())
            self._summed = (version, list(accumulate(logs, initial=0.0)))
        return self._summed[1]


def _at(cumulative: Sequence[float], calls: float) -> float:
    """The cumulative hazard at `calls`, evenly spread within a bin."""
    index = _bin(calls)
    share = (calls - _EDGES[index]) / (_EDGES[index + 1] - _EDGES[index])
    return cumulative[index] + max(share, 0.0) * (cumulative[index + 1] - cumulative[index])
