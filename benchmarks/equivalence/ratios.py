"""By how much one arm differs from another, and by how much the same arm from itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: A ratio in here is called equal: what other differences of two servers easily exceed.
BAND = (0.98, 1.02)
#: Pairs below which an interval says little: a bootstrap of so few is too narrow.
FEWEST = 6
_DRAWS = 4000


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios, and its 95 % interval (bootstrap over the pairs)."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if self.pairs > 1 else ""
        return f"{self.mean:.3f}{interval}"


def verdict(found: Ratio, control: Ratio) -> str:
    """Whether there is a difference; control: the ratio of two arms that are the same.

    equal: the interval is within `BAND`. unequal: it is outside, and apart from the control's.
    open: neither, or there are fewer than `FEWEST` pairs.
    """
    low, high = BAND
    if found.pairs < FEWEST:
        return "open"
    if low <= found.low and found.high <= high:
        return "equal"
    outside = found.high < low or found.low > high
    apart = found.high < control.low or found.low > control.high
    return "unequal" if outside and apart else "open"


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
