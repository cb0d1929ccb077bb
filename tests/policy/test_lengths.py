"""How many calls are left: learned from workflows that ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.lengths import LengthModel


def test_before_any_has_ended_agents_make_tens_of_calls():
    assert 12 < LengthModel().remaining(0) < 25
    assert 12 < LengthModel(LengthModel()).remaining(0) < 25


def test_the_mean_of_those_who_got_so_far():
    model = LengthModel(LengthModel())
    for _ in range(60):
        model.observe(10)
        model.observe(50)
    assert model.remaining(0) == pytest.approx(30, rel=0.15)
    assert model.remaining(20) == pytest.approx(30, rel=0.2)
    assert model.remaining(40) < 14


def test_who_is_longer_than_any_goes_on_a_little():
    model = LengthModel(LengthModel())
    for _ in range(200):
        model.observe(8)
    assert 1.0 <= model.remaining(200) < 100


def test_a_new_class_starts_from_what_all_classes_did_and_forgets():
    everyone = LengthModel()
    first = LengthModel(everyone)
    for _ in range(100):
        first.observe(100)
    assert LengthModel(everyone).remaining(0) > 60
    for _ in range(3_000):
        first.observe(4)
    assert first.remaining(0) < 6


@given(st.lists(st.integers(0, 5_000), max_size=50), st.integers(0, 10_000))
def test_at_least_one_call_is_left_and_never_nonsense(ended, done):
    model = LengthModel(LengthModel())
    for calls in ended:
        model.observe(calls)
    assert 1.0 <= model.remaining(done) <= max(5_000 * 1.25, done)
