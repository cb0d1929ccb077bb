"""Random draws shared by the generators."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

#: Standard normal deviate of the 90th percentile.
_Z90 = 1.2816


class LogNormal(NamedTuple):
    """A log-normal distribution given by two published quantiles."""

    p50: float
    p90: float

    def draw(self, rng: random.Random) -> float:
        return rng.lognormvariate(math.log(self.p50), math.log(self.p90 / self.p50) / _Z90)

    def whole(self, rng: random.Random, low: int, high: int) -> int:
        """A draw rounded to a whole number, clipped to `low` and `high`."""
        return max(low, min(high, round(self.draw(rng))))


def stream(name: str, seed: int, index: int) -> random.Random:
    """The random numbers of one session: they depend on nothing else."""
    return random.Random(f"builtin/{name}/{seed}/{index}")
