"""How many calls are left: learned from workflows that ended."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.lengths import LengthModel


def live(model: LengthModel, calls: int, ends: bool = True) -> None:
    """A workflow makes so many calls, and ends."""
    for number in range(1, calls + 1):
        model.observe_call(number)
    if ends:
        model.observe_end(calls)


def test_before_any_has_ended_agents_make_tens_of_calls():
    assert 25 < LengthModel().remaining(0) < 50
    assert 25 < LengthModel(LengthModel()).remaining(0) < 50


def test_the_mean_of_those_who_got_so_far():
    model = LengthModel(LengthModel())
    for _ in range(60):
        live(model, 10)
        live(model, 50)
    assert model.remaining(0) == pytest.approx(30, rel=0.15)
    assert model.remaining(20) == pytest.approx(30, rel=0.2)
    assert model.remaining(40) < 14


def test_who_is_longer_than_any_goes_on_a_little():
    model = LengthModel(LengthModel())
    for _ in range(200):
        live(model, 8)
    assert 1.0 <= model.remaining(200) < 100


def test_a_new_class_starts_from_what_all_classes_did_and_forgets():
    everyone = LengthModel()
    first = LengthModel(everyone)
    for _ in range(100):
        live(first, 100)
    assert LengthModel(everyone).remaining(0) > 60
    for _ in range(3_000):
        live(first, 4)
    assert first.remaining(0) < 6


def test_who_still_runs_counts_for_as_far_as_it_has_come():
    """What has ended first is short; the others are not over."""
    model, misled = LengthModel(LengthModel()), LengthModel(LengthModel())
    for _ in range(10):
        live(model, 5)
        live(misled, 5)
    for _ in range(30):
        live(model, 40, ends=False)
    assert misled.remaining(5) < 20
    assert model.survival(0, [20])[0] == pytest.approx(0.75, abs=0.1)
    assert model.remaining(5) > 30


def test_an_end_that_was_none_is_taken_back():
    model = LengthModel(LengthModel())
    for _ in range(20):
        live(model, 10)
    before = model.record(), model.remaining(3)
    model.observe_end(7)
    assert model.remaining(3) < before[1]
    model.retract_end(7)
    assert (model.record(), model.remaining(3)) == before


@given(
    st.lists(st.integers(1, 60), max_size=20),
    st.integers(0, 200),
    st.lists(st.floats(0, 500), min_size=2, max_size=9),
)
def test_survival_falls_from_one(ended, done, ahead):
    model = LengthModel(LengthModel())
    for calls in ended:
        live(model, calls)
    alive = model.survival(done, [0.0, *sorted(ahead)])
    assert alive[0] == pytest.approx(1.0)
    assert all(0.0 <= later <= sooner for sooner, later in pairwise(alive))


@given(st.lists(st.integers(0, 600), max_size=20), st.integers(0, 10_000))
def test_at_least_one_call_is_left_and_never_nonsense(ended, done):
    model = LengthModel(LengthModel())
    for calls in ended:
        live(model, calls)
    mean, variance = model.remaining_moments(done)
    assert 1.0 <= mean <= 10_000 and variance >= 0.0
