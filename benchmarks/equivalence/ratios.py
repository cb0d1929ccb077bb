"""By how much one arm differs from another, and by how much the same arm from itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: A ratio in here is called equal: what other differences of two servers easily exceed.
BAND = (0.98, 1.02)
_DRAWS = 4000


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios, and its 95 % interval (bootstrap over the pairs)."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """equal: the interval is within `BAND`; unequal: outside; open: the noise is larger."""
        low, high = BAND
        if low <= self.low and self.high <= high:
            return "equal"
        if self.high < low or self.low > high:
            return "unequal"
        return "open"

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(measured: Sequence[float], reference: Sequence[float], seed: int = 0) -> Ratio:
    """Of values that were measured in pairs, all above 0.

    Raises:
        ValueError: they are no pairs, there are none, or one is not above 0.
    """
    if len(measured) != len(reference) or not measured:
        raise ValueError(f"no pairs: {len(measured)} and {len(reference)} values")
    if min(*measured, *reference) <= 0:
        raise ValueError("a ratio needs values above 0")
    logs = np.log(np.asarray(measured) / np.asarray(reference))
    drawn = np.random.default_rng(seed).choice(logs, (_DRAWS, len(logs))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Ratio(math.exp(logs.mean()), math.exp(low), math.exp(high), len(logs))


def middle(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Geometric mean of each pair: two arms that are the same make one steadier reference."""
    return [math.sqrt(a * b) for a, b in zip(first, second, strict=True)]
