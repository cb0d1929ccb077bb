"""Fitting a step cost: known coefficients come back out of noise and outliers."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.simulator.fitting import Sample, _nonnegative, fit
from vllm_saga.simulator.hardware import Batch, Linear


def designed(cost: Linear, latency_s: float, seed: int, noise: float, outliers: float):
    """Prefills from short to long, alone and after a context; decode of several widths."""
    rng = random.Random(seed)
    work: list[tuple[list[Batch], float]] = []
    for new in (2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        for before in (0, 3000, 20_000):
            work.append(([Batch.of([(new, before)])], 1.0))
    for chunks in (2, 3, 4, 6):
        work.append(([Batch.of([(2048, 2048 * n)]) for n in range(chunks)], 1.0))
    for width in (1, 4, 16, 64, 128):
        for before in (32, 2000, 8000):
            work.append(([Batch.of([(1, before + n)] * width) for n in range(16)], 0.0))
    samples = []
    for batches, calls in work * 3:
        seconds = sum(map(cost.step_s, batches)) + calls * latency_s
        seconds *= max(0.5, rng.gauss(1, noise))
        if rng.random() < outliers:
            seconds *= rng.choice((0.3, 2, 5, 20))
        samples.append(Sample(seconds, [(batch, 1.0) for batch in batches], calls))
    return samples


GPU = Linear(base_s=1e-3, token_s=2.6e-5, sequence_s=1e-5, pair_s=1.1e-9, kv_token_s=5e-8,
             free_tokens=200)  # fmt: skip
CPU = Linear(base_s=8e-3, token_s=9e-5, sequence_s=4e-4, pair_s=1e-8, kv_token_s=2e-7)


@pytest.mark.parametrize("cost", [GPU, CPU], ids=["roofline", "linear"])
def test_known_coefficients_come_back(cost: Linear) -> None:
    found, report = fit(designed(cost, 2e-3, 1, noise=0, outliers=0))
    for name in ("base_s", "token_s", "sequence_s", "pair_s", "kv_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(cost, name), rel=0.1), name
    assert found.free_tokens == pytest.approx(cost.free_tokens, rel=0.15)
    assert report.latency_s == pytest.approx(2e-3, rel=0.15)
    assert report.median_relative_error < 0.01


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), cost=st.sampled_from([GPU, CPU]))
def test_noise_and_outliers_do_little_harm(seed: int, cost: Linear) -> None:
    found, report = fit(designed(cost, 2e-3, seed, noise=0.05, outliers=0.05))
    assert found.token_s == pytest.approx(cost.token_s, rel=0.1)
    assert found.pair_s == pytest.approx(cost.pair_s, rel=0.15)
    for batch in (
        Batch.of([(1, 500)]),
        Batch.of([(1, 4000)] * 32),
        Batch.of([(1024, 4000)]),
        Batch.of([(2048, 30_000), *[(1, 3000)] * 40]),
    ):
        assert found.step_s(batch) == pytest.approx(cost.step_s(batch), rel=0.08)
    assert 0.02 < report.median_relative_error < 0.06
    assert report.outliers < 0.15 * report.samples


def test_outliers_are_counted() -> None:
    samples = designed(CPU, 0, 3, noise=0.01, outliers=0)
    samples[7] = samples[7]._replace(seconds=3 * samples[7].seconds)
    _, report = fit(samples)
    assert report.samples == len(samples)
    assert 1 <= report.outliers <= 3


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        ([], "0 samples are too few"),
        ([Sample(0.0, [(Batch(1, 1, 1, 1), 1.0)])] * 12, "positive, finite"),
        ([Sample(float("nan"), [(Batch(1, 1, 1, 1), 1.0)])] * 12, "positive, finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(samples: list[Sample], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fit(samples)


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 20))
def test_nonnegative_least_squares_is_optimal(seed: int, columns: int, extra: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(columns + extra, columns)) * 10.0 ** rng.integers(-6, 6, columns)
    b = rng.normal(size=columns + extra)
    x = _nonnegative(a, b)
    assert (x >= 0).all()
    # Karush-Kuhn-Tucker: no slope where a coefficient is free, none downwards where it is 0.
    slope = (a / np.linalg.norm(a, axis=0)).T @ (a @ x - b)
    assert (slope > -1e-6).all()
    assert np.abs(slope[x > 0]).max(initial=0) < 1e-6
