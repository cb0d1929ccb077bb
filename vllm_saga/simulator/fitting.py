"""Fits the coefficients of a `Linear` step cost to measured times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from vllm_saga.simulator.hardware import Batch, Linear

#: Samples a fit needs: twice its coefficients.
MIN_SAMPLES = 12


class Sample(NamedTuple):
    """Measured: `seconds` = sum of (weight x time of the step) over `steps` + `calls` x latency.

    latency: what a call spends outside steps, a constant of its own that the fit finds.
    """

    seconds: float
    steps: Sequence[tuple[Batch, float]]
    calls: float = 0.0


class FitReport(msgspec.Struct, frozen=True):
    """How well the fit explains the samples; errors are relative to the measured seconds.

    outliers: samples off by more than five times the typical error. latency_s: seconds a call
    spends in the engine outside its steps; not part of the cost.
    """

    samples: int
    outliers: int
    median_relative_error: float
    p90_relative_error: float
    latency_s: float


def fit(samples: Sequence[Sample]) -> tuple[Linear, FitReport]:
    """Coefficients, none negative, with the least relative error; outliers count for little.

    ValueError if there are fewer than `MIN_SAMPLES`, or one took no time.
    """
    if len(samples) < MIN_SAMPLES:
        raise ValueError(f"{len(samples)} samples are too few for a fit: at least {MIN_SAMPLES}")
    seconds = np.array([sample.seconds for sample in samples])
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError("every sample must have taken a positive, finite number of seconds")
    rows = [
        (index, weight, *batch)
        for index, sample in enumerate(samples)
        for batch, weight in sample.steps
    ]
    table = np.array(rows, dtype=float)
    calls = np.array([sample.calls for sample in samples])
    free_tokens, coefficients = _search(table, calls, seconds)
    errors = np.abs(_design(table, calls, free_tokens) @ coefficients / seconds - 1)
    base, token, sequence, pair, kv_token, latency = map(float, coefficients)
    cost = Linear(
        base_s=base, token_s=token, sequence_s=sequence, pair_s=pair, kv_token_s=kv_token,
        free_tokens=free_tokens if token else 0,
    )  # fmt: skip
    typical = float(np.median(errors))
    return cost, FitReport(
        samples=len(samples),
        outliers=int((errors > 5 * typical).sum()),
        median_relative_error=typical,
        p90_relative_error=float(np.quantile(errors, 0.9)),
        latency_s=latency,
    )


def _search(table: np.ndarray, calls: np.ndarray, seconds: np.ndarray) -> tuple[int, np.ndarray]:
    """The number of free tokens, tried from 0 up in steps of a quarter, and the best fit for it."""
    tried = []
    for free_tokens in [0, *sorted({round(2 ** (n / 3)) for n in range(3, 34)})]:
        design = _design(table, calls, free_tokens) / seconds[:, None]
        coefficients = _robust(design)
        errors = np.sort(np.abs(design @ coefficients - 1))
        tried.append((float(errors[: -(-len(errors) * 9 // 10)].mean()), free_tokens, coefficients))
    # The first that is about as good as the best: without a reason, no token is free.
    good = 1.02 * min(loss for loss, _, _ in tried) + 1e-9
    return next((free, coefficients) for loss, free, coefficients in tried if loss <= good)


def _design(table: np.ndarray, calls: np.ndarray, free_tokens: int) -> np.ndarray:
    """One row per sample: what each coefficient is multiplied with."""
    owner, weight, new, sequences, pairs, kv = table.T
    columns = (np.ones_like(new), np.maximum(new, free_tokens), sequences, pairs, kv)
    sums = [
        np.bincount(owner.astype(int), weights=weight * column, minlength=len(calls))
        for column in columns
    ]
    return np.stack([*sums, calls], axis=1)


def _robust(design: np.ndarray) -> np.ndarray:
    """The x >= 0 with design @ x near 1 for most rows: reweighted least squares (Cauchy)."""
    weights = np.ones(len(design))
    for _ in range(20):
        root = np.sqrt(weights)
        x = _nonnegative(design * root[:, None], root)
        errors = np.abs(design @ x - 1)
        scale = max(2.385 * float(np.median(errors)) / 0.6745, 1e-6)
        weights = 1 / (1 + (errors / scale) ** 2)
    return x


def _nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |a x - b|, by active sets (Lawson & Hanson 1974, chapter 23)."""
    norms = np.linalg.norm(a, axis=0)
    norms[norms == 0] = 1
    gram, right = (a / norms).T @ (a / norms), (a / norms).T @ b
    x = np.zeros(len(norms))
    active = np.zeros(len(norms), dtype=bool)
    for _ in range(3 * len(norms)):
        gradient = np.where(active, -np.inf, right - gram @ x)
        entering = int(gradient.argmax())
        if gradient[entering] <= 1e-9 * len(a):
            break
        active[entering] = True
        while True:
            trial = np.zeros_like(x)
            trial[active] = np.linalg.lstsq(gram[np.ix_(active, active)], right[active])[0]
            blocking = active & (trial <= 0)
            if not blocking.any():
                break
            room = np.maximum(x[blocking] - trial[blocking], 1e-300)
            x += (x[blocking] / room).min() * (trial - x)
            active &= x > 1e-12
            x[~active] = 0
        x = trial
    return x / norms
