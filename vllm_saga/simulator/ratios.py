"""Ratios of two arms on the same work, with bootstrap intervals.

The unit of resampling is the session, which is drawn for both arms at once; several seeds are
resampled too. Everything is done on logarithms, so that the mean of ratios is geometric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Differences under 5 % are called ties.
TIE = 0.05
#: Fewest seeds that are resampled; with fewer, only the sessions within each seed are.
MIN_SEEDS = 3
RESAMPLES = 1000
#: Of the resampling, so that the same input gives the same interval.
SEED = 20_260_501


def percentile(ordered: Sequence[float] | np.ndarray, share: float) -> float:
    """Of sorted values, by linear interpolation between order statistics; NaN for none."""
    if not len(ordered):
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def is_tie(ratio: float) -> bool:
    """Whether a ratio is nearer to 1 than `TIE`, in either direction."""
    return ratio > 0 and max(ratio, 1 / ratio) < 1 + TIE


@dataclass(frozen=True, slots=True)
class Sample:
    """One metric of one arm and seed: sorted values, and which session each belongs to."""

    values: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, by_session: Sequence[Sequence[float]]) -> Sample:
        values = np.array([value for own in by_session for value in own], dtype=float)
        owners = np.array([k for k, own in enumerate(by_session) for _ in own], dtype=int)
        order = np.argsort(values, kind="stable")
        return cls(values[order], owners[order])


#: One number of a sample per row of `times`, in which session k is taken `times[row, k]` times;
#: NaN if nothing is left.
Statistic = Callable[[Sample, np.ndarray], np.ndarray]


def mean(sample: Sample, times: np.ndarray) -> np.ndarray:
    sessions = times.shape[1]
    sums = np.bincount(sample.owners, sample.values, minlength=sessions)
    counts = np.bincount(sample.owners, minlength=sessions)
    with np.errstate(invalid="ignore"):
        return (times @ sums) / (times @ counts)


def quantile(sample: Sample, times: np.ndarray, share: float) -> np.ndarray:
    return np.array(
        [percentile(np.repeat(sample.values, row[sample.owners]), share) for row in times]
    )


def draw(sessions: int, rng: np.random.Generator) -> np.ndarray:
    """How often each session is taken: row 0 once each, then `RESAMPLES` draws with replacement."""
    once = np.ones((1, sessions), dtype=int)
    if not sessions:
        return once
    drawn = rng.multinomial(sessions, np.full(sessions, 1 / sessions), size=RESAMPLES)
    return np.concatenate([once, drawn])


def logs(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Natural logarithm of above / below; 0 if they are equal, NaN where there is no ratio."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(above) - np.log(below)
    return np.where(above == below, 0.0, np.where(np.isfinite(found), found, math.nan))


def estimate(rows: Sequence[np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
    """{"mean", "ci95": [low, high]} from one row of log ratios per seed.

    A row holds the measured ratio, then its resamples, or the measured ratio alone where nothing
    within a seed can be resampled. Seeds without a ratio are left out. The interval is widened
    where needed to hold the mean; it is [None, None] where nothing can be resampled.
    """
    rows = [row for row in rows if math.isfinite(row[0])]
    if not rows:
        return {"mean": None, "ci95": [None, None]}
    table = np.array(rows)
    seeds, width = table.shape
    point = float(table[:, 0].mean())
    if seeds >= MIN_SEEDS:
        picked = rng.integers(seeds, size=(RESAMPLES, seeds))
        resample = rng.integers(min(1, width - 1), width, size=(RESAMPLES, seeds))
        draws = table[picked, resample].mean(axis=1)
    else:
        draws = table[:, 1:].mean(axis=0)
    draws = np.sort(draws[np.isfinite(draws)])
    if not len(draws):
        return {"mean": math.exp(point), "ci95": [None, None]}
    low, high = percentile(draws, 0.025), percentile(draws, 0.975)
    return {
        "mean": math.exp(point),
        "ci95": [math.exp(min(low, point)), math.exp(max(high, point))],
    }
