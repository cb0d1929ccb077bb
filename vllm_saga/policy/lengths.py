"""How many calls workflows make before they end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_saga.policy.records import NUM_LENGTH_BINS as _NUM_BINS

_GROWTH = 1.25
_FORGET_AT = 500.0
# Coding agents make tens of calls: an exponential distribution around this many.
_PRIOR_CALLS = 20.0
_BACK_OFF_WEIGHT = 4.0
# Longer than any seen: as many more as a quarter of what it has made.
_BEYOND = 0.25


def _bin(calls: float) -> int:
    return min(int(math.log(max(calls, 1.0)) / math.log(_GROWTH)), _NUM_BINS - 1)


_LENGTHS = tuple(_GROWTH ** (index + 0.5) for index in range(_NUM_BINS))


class LengthModel:
    """Empirical distribution of the calls of ended workflows of one agent class.

    A log-binned histogram (bins 25 % wide, up to about 3,000 calls), halved every 500 ends. Little
    evidence is completed by `parent`, at the weight of four workflows, as in `GapModel`.
    """

    def __init__(self, parent: LengthModel | None = None) -> None:
        self._parent = parent
        self._counts = [0.0] * _NUM_BINS
        self._ends = 0.0
        if parent is None:
            for index in range(_NUM_BINS):
                low, high = _GROWTH**index - 1.0, _GROWTH ** (index + 1) - 1.0
                share = math.exp(-low / _PRIOR_CALLS) - math.exp(-high / _PRIOR_CALLS)
                self._counts[index] = _BACK_OFF_WEIGHT * share
            self._ends = _BACK_OFF_WEIGHT

    def observe(self, calls: int) -> None:
        """A workflow ended after `calls` calls."""
        if self._parent is not None:
            self._parent.observe(calls)
        self._counts[_bin(calls)] += 1.0
        self._ends += 1.0
        if self._ends > _FORGET_AT:
            self._counts = [count * 0.5 for count in self._counts]
            self._ends *= 0.5

    def retract(self, calls: int) -> None:
        """A workflow said to have ended after `calls` calls has not."""
        if self._parent is not None:
            self._parent.retract(calls)
        index = _bin(calls)
        still = min(self._counts[index], 1.0)
        self._counts[index] -= still
        self._ends -= still

    def remaining(self, done: int) -> float:
        """Calls expected of a workflow that has made `done` and has not ended; at least 1."""
        return self.remaining_moments(done)[0]

    def remaining_moments(self, done: int) -> tuple[float, float]:
        """Mean and variance of the calls left to a workflow that made `done` and has not ended."""
        parent = self._parent
        scale = _BACK_OFF_WEIGHT / parent._ends if parent is not None else 0.0
        weight = left = squares = 0.0
        for index in range(_bin(done), _NUM_BINS):
            more = _LENGTHS[index] - done
            if more > 0.0:
                count = self._counts[index]
                if parent is not None:
                    count += scale * parent._counts[index]
                weight += count
                left += count * more
                squares += count * more * more
        # Hardly any got so far: what few did says little.
        beyond = _BEYOND * (_BEYOND * done)
        weight += _BEYOND
        mean = (left + beyond) / weight
        variance = (squares + beyond * (_BEYOND * done)) / weight - mean * mean
        return max(mean, 1.0), max(variance, 0.0)

    def record(self) -> tuple[float, ...]:
        """All there is to know but for the parent, for `restore`: ended workflows by bin."""
        return tuple(self._counts)

    def restore(self, record: Sequence[float]) -> None:
        self._counts = list(record)
        self._ends = sum(record)
