"""Whether predicted distributions come true: where in them what happened fell."""

from __future__ import annotations

from collections.abc import Sequence

NUM_BINS = 10
_FORGET_AT = 500.0
# Until something was seen nothing speaks against a prediction: this many that came true.
_PRIOR_WEIGHT = 4.0


class Calibration:
    """Where in the predicted distribution each observation fell.

    Were the predictions right, these places (the probability integral transform, PIT) would be
    uniform on [0, 1]. A prediction in bins gives an interval, over which the observation is spread
    evenly (the non-randomised PIT of Czado, Gneiting and Held, Biometrics 65, 2009). A histogram of
    ten bins, halved every 500 observations.
    """

    def __init__(self) -> None:
        self._bins = [_PRIOR_WEIGHT / NUM_BINS] * NUM_BINS
        self._weight = _PRIOR_WEIGHT

    def observe(self, below: float, up_to: float) -> None:
        """What happened had a predicted probability between `below` and `up_to` of being less."""
        low = min(max(below, 0.0), 1.0) * NUM_BINS
        high = min(max(up_to, 0.0), 1.0) * NUM_BINS
        first = min(int(low), NUM_BINS - 1)
        last = min(int(high), NUM_BINS - 1)
        if first == last or high <= low:
            self._bins[first] += 1.0
        else:
            for index in range(first, last + 1):
                part = min(high, index + 1) - max(low, index)
                self._bins[index] += part / (high - low)
        self._weight += 1.0
        if self._weight > _FORGET_AT:
            self._bins = [value * 0.5 for value in self._bins]
            self._weight *= 0.5

    @property
    def score(self) -> float:
        """1 = every predicted probability came true as often as it said, 0 = none of them.

        1 less twice the mean distance of the places' distribution from the uniform one: at worst,
        where all fall on one end, that distance is a half.
        """
        distance = reached = 0.0
        for index in range(NUM_BINS - 1):
            reached += self._bins[index]
            distance += abs(reached / self._weight - (index + 1) / NUM_BINS)
        return max(1.0 - 2.0 * distance / (NUM_BINS - 1), 0.0)

    def record(self) -> tuple[float, ...]:
        """All there is to know, for `restore`: the weight in each of the ten bins."""
        return tuple(self._bins)

    def restore(self, record: Sequence[float]) -> None:
        self._bins = list(record)
        self._weight = max(sum(record), _PRIOR_WEIGHT)
