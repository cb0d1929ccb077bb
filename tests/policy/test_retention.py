"""Which context dies first, by each strategy, and what comes before any strategy."""

from __future__ import annotations

import pytest
from helpers import arrival, make_policy, run_call
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.retention import DEAD, SHARED, UNOWNED, TimeToLive
from vllm_saga.policy.retention.continuum import MOST_GAPS, MOST_TOOLS
from vllm_saga.policy.retention.wa_lru import time_to_live_s
from vllm_saga.policy.stepfit import Step

STRATEGIES = ["value", "wa-lru", "continuum", "lru"]


def away(policy, session, tokens, now, tools=None):
    """A session that has made one call and has no place any more; returns its context."""
    prompt = [hash(session) % 1000] * tokens
    policy.on_arrival(arrival(session, prompt, session), now)
    policy.on_finish(session, tokens, now, tools)
    found = policy.table.sessions["", session]
    policy.residency.leave(found.workflow)
    return found.contexts[0]


def order(policy, contexts, now):
    """Indices of `contexts`, the first to die first."""
    ranks = policy.keep_ranks(contexts, now)
    return sorted(range(len(contexts)), key=ranks.__getitem__)


@pytest.mark.parametrize("retention", STRATEGIES)
def test_dead_before_unowned_before_away_before_held_before_shared_before_residents(retention):
    policy = make_policy(pool_blocks=100, retention=retention)
    gone = away(policy, "gone", 40, 0.0)
    run_call(policy, arrival("r1", [1] * 40, "resident"), [], 0.0)
    resident = policy.table.sessions["", "resident"].contexts[0]
    policy.on_arrival(arrival("big", [2] * 360, "waits"), 1.0)
    assert policy.is_held("big")
    waiting = policy.calls["big"].context
    run_call(policy, arrival("e", [3] * 20, "resident", last=True), [], 1.0)
    dead = gone.session.workflow
    ranks = policy.keep_ranks([gone, waiting, resident], 2.0)
    resident_is_dead = resident.dead
    assert resident_is_dead and ranks[2] == DEAD
    assert DEAD < UNOWNED < ranks[0] < ranks[1] < SHARED
    assert not dead.resident


@pytest.mark.parametrize("retention", STRATEGIES)
def test_of_two_alike_the_longer_away_dies_first(retention):
    policy = make_policy(pool_blocks=1000, retention=retention)
    contexts = [away(policy, "new", 40, 50.0), away(policy, "old", 40, 0.0)]
    assert order(policy, contexts, 60.0) == [1, 0]


def test_value_keeps_who_is_expected_back_soon():
    policy = make_policy(pool_blocks=1000)
    quick = away(policy, "quick", 40, 9.0, ["ls"])
    slow = away(policy, "slow", 40, 10.0, ["train"])
    for agent in (quick.session.workflow.agent, slow.session.workflow.agent):
        for _ in range(300):
            for tool, gap_s in (("ls", 2.0), ("train", 500.0)):
                agent.observe_call(None, tool, 10)
                agent.gaps_after(tool).observe_return(gap_s)
    # LRU would keep the slow one, which was here last.
    assert order(policy, [slow, quick], 10.5) == [0, 1]
    assert make_policy(retention="lru").keep_ranks([slow, quick], 10.5) == [(2, 10.0), (2, 9.0)]


def test_value_prefers_what_is_dear_to_compute_again():
    policy = make_policy(pool_blocks=10_000)
    # Steps whose cost is in the pairs of tokens: a token late in a context is dearer.
    for count in range(1, 400):
        tokens = 10 * (count % 40 + 1)
        pairs = tokens * tokens // 2
        policy.cost.observe(Step(tokens, pairs, 0), 0.01 + 1e-5 * pairs, 0.01)
    short, long = away(policy, "short", 40, 0.0), away(policy, "long", 4000, 0.0)
    assert order(policy, [long, short], 1.0) == [1, 0]


def test_wa_lru_protects_for_the_tool_s_95th_percentile_less_under_pressure():
    assert time_to_live_s(100.0, 0.5) == 100.0
    assert time_to_live_s(100.0, 0.9) == 50.0
    assert time_to_live_s(1000.0, 0.5) == 300.0
    policy = make_policy(pool_blocks=1000, retention="wa-lru")
    context = away(policy, "s", 40, 0.0)
    gaps = context.session.workflow.agent.gaps
    for _ in range(200):
        gaps.observe_return(10.0)
    policy.retention.on_rest(context, 0.0)
    assert 9.0 < context.protected_until < 14.0
    assert policy.keep_ranks([context], 8.0)[0][0] > policy.keep_ranks([context], 20.0)[0][0]


def test_continuum_protects_as_long_as_it_pays():
    policy = make_policy(pool_blocks=100_000, retention="continuum")
    for _ in range(200):
        policy.cost.observe(Step(1000, 500_000, 0), 1.0, 1.0)
        policy.retention._time_to_live.saw_gap("", 3.0)
    cheap, dear = away(policy, "cheap", 40, 0.0), away(policy, "dear", 40_000, 0.0)
    assert cheap.protected_until == 0.0
    assert dear.protected_until == pytest.approx(3.0)


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(0.0, 1e4)), max_size=50))
def test_time_to_live_is_one_of_the_gaps_or_nothing(seen):
    model = TimeToLive()
    for tool, gap in seen * 5:
        model.saw_gap(tool, gap)
    tau = model.seconds("a", 5.0)
    if len(seen) * 5 > 100:
        assert tau == 0.0 or tau in {gap for _, gap in seen}


def test_time_to_live_forgets_and_stays_bounded():
    model = TimeToLive()
    for number in range(3 * MOST_GAPS):
        model.saw_gap(f"tool-{number % 1000}", float(number))
    assert len(model._gaps) <= MOST_GAPS and len(model._gaps_of) <= MOST_TOOLS + 1
