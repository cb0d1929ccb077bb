from __future__ import annotations

import random

import pytest

from benchmarks.equivalence import ratios


def noisy(ratio: float, noise: float, pairs: int) -> tuple[list[float], list[float]]:
    """Values of two arms, `ratio` apart, in rounds that differ far more than the arms do."""
    source = random.Random(1)
    reference = [source.uniform(5, 50) for _ in range(pairs)]
    return [value * ratio * source.gauss(1, noise) for value in reference], reference


@pytest.mark.parametrize(
    ("true", "noise", "verdict"),
    [(1.0, 0.005, "equal"), (1.05, 0.005, "unequal"), (0.95, 0.005, "unequal"), (1.0, 0.2, "open")],
)
def test_a_difference_is_told_from_noise(true: float, noise: float, verdict: str) -> None:
    found = ratios.ratio(*noisy(true, noise, 18))
    control = ratios.ratio(*noisy(1.0, noise, 18))
    assert ratios.verdict(found, control) == verdict
    assert found.low <= found.mean <= found.high and found.pairs == 18
    assert found.mean == pytest.approx(true, rel=2 * noise)


def test_ratios_are_of_pairs_in_either_order() -> None:
    measured, reference = noisy(1.3, 0.05, 9)
    assert ratios.ratio(measured, reference).mean == pytest.approx(
        1 / ratios.ratio(reference, measured).mean
    )


@pytest.mark.parametrize(
    ("measured", "reference"), [([], []), ([1.0], []), ([0.0], [1.0]), ([1.0], [-1.0])]
)
def test_what_is_no_pair_of_amounts_is_refused(
    measured: list[float], reference: list[float]
) -> None:
    with pytest.raises(ValueError):
        ratios.ratio(measured, reference)


def test_what_the_control_does_too_is_no_difference() -> None:
    found = ratios.Ratio(1.1, 1.05, 1.15, 18)
    assert ratios.verdict(found, ratios.Ratio(1.0, 0.99, 1.01, 18)) == "unequal"
    assert ratios.verdict(found, ratios.Ratio(1.0, 0.94, 1.06, 18)) == "open"


def test_few_pairs_decide_nothing() -> None:
    found = ratios.ratio([1.0] * (ratios.FEWEST - 1), [1.0] * (ratios.FEWEST - 1))
    assert ratios.verdict(found, found) == "open"
    assert str(ratios.ratio([2.0], [1.0])) == "2.000"


def test_the_middle_of_two_arms_is_geometric() -> None:
    assert ratios.middle([1.0, 2.0], [4.0, 2.0]) == [2.0, 2.0]
