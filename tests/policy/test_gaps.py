"""The gap model: what it says of workflows that come back and of those that do not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.gaps import GapModel, judged_again_at

gaps = st.lists(st.floats(0.001, 2000.0), max_size=60)


@given(gaps, st.integers(0, 30), st.floats(0.0, 900.0), st.floats(1.0, 900.0))
def test_the_longer_away_the_less_likely_back(seen, ends, idle, more):
    model = GapModel(GapModel())
    for gap in seen:
        model.observe_return(gap)
    for _ in range(ends):
        model.observe_end()
    assert 0.0 <= model.p_return(idle + more) <= model.p_return(idle) < 1.0


@given(gaps, st.integers(0, 30), st.floats(0.05, 0.95))
def test_patience_is_where_the_probability_crosses(seen, ends, threshold):
    model = GapModel()
    for gap in seen:
        model.observe_return(gap)
    for _ in range(ends):
        model.observe_end()
    patience = model.patience_s(threshold)
    # Sums of floats: equal but for their last digit counts as crossed.
    assert model.p_return(patience * 1.01) < threshold + 1e-9 or patience > 900.0


@given(st.floats(0.0, 1e7), st.floats(0.01, 1000.0), st.floats(1.0, 100.0))
def test_an_absence_is_judged_a_few_times_and_last_when_its_end_is_presumed(since, doubt, times):
    patience = times * doubt
    now, judged = since, 0
    while now < since + patience:
        again = judged_again_at(since, now, doubt, patience)
        assert now < again <= since + patience
        now, judged = again, judged + 1
    assert judged < 3 + math.log2(times)


def test_one_shot_traffic_is_given_up_at_once():
    model = GapModel()
    for _ in range(50):
        model.observe_end()
    assert model.patience_s(0.4) <= 0.02


def test_short_gaps_make_impatient_and_long_gaps_patient():
    quick, slow = GapModel(), GapModel()
    for _ in range(100):
        quick.observe_return(0.5)
        slow.observe_return(20.0)
    for model in (quick, slow):
        for _ in range(5):
            model.observe_end()
    assert quick.patience_s(0.4) < 1.5
    assert slow.patience_s(0.4) > 15.0


def test_a_new_class_starts_from_what_all_classes_did():
    everyone = GapModel()
    first = GapModel(everyone)
    for _ in range(40):
        first.observe_end()
    assert GapModel(everyone).patience_s(0.4) <= 0.02


def test_a_retracted_end_leaves_no_trace():
    model = GapModel(GapModel())
    before = model.p_return(1.0)
    model.observe_end()
    model.retract_end()
    assert model.p_return(1.0) == pytest.approx(before)


def test_an_old_habit_is_forgotten():
    model = GapModel()
    for _ in range(3000):
        model.observe_return(100.0)
    for call in range(12_000):
        model.observe_return(0.1)
        if call % 40 == 0:
            model.observe_end()
    assert model.patience_s(0.4) < 1.0


@given(st.lists(st.floats(0.02, 500.0), min_size=30, max_size=60), st.integers(0, 30))
def test_giving_way_is_cheapest_when_it_is_said_to_be(seen, ends):
    model = GapModel()
    for gap in seen:
        model.observe_return(gap)
    for _ in range(ends):
        model.observe_end()

    def cost(wait_s: float, again_s: float) -> float:
        kept = sum(gap if gap <= wait_s else wait_s + again_s for gap in seen)
        return kept + ends * wait_s

    for again_s in (0.5, 5.0, 50.0):
        said = cost(model.give_way_s(again_s), again_s)
        best = min(cost(t, again_s) for t in (0.0, *seen))
        # Bins are 33 % wide, and the prior and one end count as well.
        assert said <= 1.4 * best + 6 * again_s


@given(gaps, st.floats(0.01, 50.0), st.floats(1.0, 10.0))
def test_the_dearer_the_later(seen, again_s, factor):
    model = GapModel()
    for gap in seen:
        model.observe_return(gap)
    assert model.give_way_s(again_s) <= model.give_way_s(factor * again_s)
    assert model.give_way_s(0.0) == 0.0


@given(st.lists(st.floats(0.1, 1e4), max_size=30))
def test_nothing_is_given_up_while_nobody_knows_what_it_costs(gaps):
    model = GapModel()
    for gap_s in gaps:
        model.observe_return(gap_s)
    assert model.give_way_s(math.inf) == math.inf
