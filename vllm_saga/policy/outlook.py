"""How much KV the residents will hold later: a forecast with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Seconds ahead that are looked at; twice as long, twice as rough.
AHEAD_S = (15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0)

Growth = Sequence[tuple[float, float]]
"""By how many blocks more than now, for each of `AHEAD_S`: mean and variance."""

NONE: Growth = ((0.0, 0.0),) * len(AHEAD_S)


class Outlook:
    """The sum of what every resident is expected to hold more, or less, at each of `AHEAD_S`.

    Workflows are taken as independent: variances add up.
    """

    def __init__(self) -> None:
        self._means = [0.0] * len(AHEAD_S)
        self._variances = [0.0] * len(AHEAD_S)
        self._members = 0

    def replace(self, old: Growth | None, new: Growth | None) -> None:
        """A resident's growth is seen anew; None before it enters and after it has left."""
        for index, ((mean, variance), (was, varied)) in enumerate(
            zip(new or NONE, old or NONE, strict=True)
        ):
            self._means[index] += mean - was
            self._variances[index] += variance - varied
        self._members += (new is not None) - (old is not None)
        if not self._members:
            # What rounding left.
            self._means = [0.0] * len(AHEAD_S)
            self._variances = [0.0] * len(AHEAD_S)

    def most(self, further: Growth, z: float) -> int:
        """The most blocks by which the residents and a further workflow will outgrow what they
        hold now, at any time ahead: mean + z standard deviations; at least 0.
        """
        sums = zip(self._means, self._variances, further, strict=True)
        return max(
            int(mean + more + z * math.sqrt(max(variance + spread, 0.0)))
            for mean, variance, (more, spread) in (*sums, (0.0, 0.0, (0.0, 0.0)))
        )
