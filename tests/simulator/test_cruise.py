"""Stretches of decode scheduled at once: the same calls at the same times as step by step."""

from __future__ import annotations

import pytest
from agents import SMALL, many

from vllm_saga.simulator import runner
from vllm_saga.simulator.cluster import Setup
from vllm_saga.simulator.placement import PLACEMENTS


def run(policy, cruises, **options):
    sessions = many(16, output=60, group="agents")
    placement = PLACEMENTS["least_loaded"]
    return runner.run_setup(Setup(sessions, SMALL, placement, cruises=cruises, **options), policy)


def times(result):
    return [(c.id, c.first_token_s, c.finished_s, c.cached_tokens) for c in result.calls]


@pytest.mark.parametrize("overlapping", [True, False])
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("lanes", [5, 12, 16])
def test_stock_is_the_same_to_the_last_bit(lanes, replicas, overlapping):
    options = {"lanes": lanes, "replicas": replicas, "overlapping": overlapping}
    stepwise, cruising = (run("vllm", cruises, **options) for cruises in (False, True))
    assert times(cruising) == times(stepwise)
    assert cruising.steps == stepwise.steps
    assert cruising.preemptions == stepwise.preemptions
    assert cruising.kv_held_hit_token_s == stepwise.kv_held_hit_token_s
    assert cruising.kv_running_token_s == pytest.approx(stepwise.kv_running_token_s, rel=0.01)
    assert cruising.schedulings < 0.6 * stepwise.schedulings


@pytest.mark.parametrize("policy", ["thunderagent", "static-cap:4", "farthest-next-use"])
def test_rivals_that_decide_when_calls_come_and_end_are_the_same(policy):
    assert times(run(policy, True, lanes=12)) == times(run(policy, False, lanes=12))


@pytest.mark.parametrize("policy", ["saga", "continuum"])
def test_decisions_by_the_clock_are_late_by_little(policy):
    cruising, stepwise = run(policy, True, lanes=12), run(policy, False, lanes=12)
    ended = [call.finished_s for call in cruising.calls], [c.finished_s for c in stepwise.calls]
    assert sum(ended[0]) == pytest.approx(sum(ended[1]), rel=0.02)
    assert cruising.schedulings < stepwise.schedulings
