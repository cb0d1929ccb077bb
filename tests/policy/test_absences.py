"""Workflows that are away: what is learned meanwhile, and what those who never return cost."""

from __future__ import annotations

import pytest
from helpers import BLOCK, arrival, check_integrity, learn_costs, make_policy, prompt, run_call


def ends_seen(policy) -> float:
    return policy.classes.everyone.gaps.record().ends


def test_who_is_away_for_long_counts_as_ended_until_it_returns():
    policy = make_policy()
    context = run_call(policy, arrival("a", prompt(1, 10), "s"), [], 0.0)
    workflow = policy.table.sessions["", "s"].workflow
    policy.on_step(1.0)
    assert ends_seen(policy) == 0.0
    policy.on_step(20.0)
    assert ends_seen(policy) == 1.0
    assert workflow.resident and not workflow.stale
    policy.on_step(1000.0)
    assert ends_seen(policy) == 1.0
    assert workflow.stale and not workflow.resident
    policy.on_arrival(arrival("b", [*context, 1], "s"), 1001.0)
    assert ends_seen(policy) == 0.0
    check_integrity(policy)


def test_one_whose_return_is_in_doubt_keeps_its_place_but_nothing_is_promised_to_it():
    policy = make_policy()
    context = run_call(policy, arrival("a", prompt(1, 10), "s"), [7] * 40, 0.0)
    residency = policy.residency
    assert residency.used_blocks > len(residency.ledger) == 20
    policy.on_step(20.0)
    assert residency.used_blocks == len(residency.ledger) == 20
    policy.on_arrival(arrival("b", [*context, 1], "s"), 21.0)
    assert residency.used_blocks > 20
    check_integrity(policy)


def test_those_who_never_return_are_not_waited_for_as_long_as_the_last_who_might():
    policy = make_policy(pool_blocks=1000)
    for number in range(30):
        run_call(policy, arrival(f"c{number}", prompt(number, 10), f"s{number}"), [], 0.3 * number)
    assert policy.state()["resident"] == 30
    for now in range(9, 20):
        policy.on_step(float(now))
    assert policy.state()["resident"] == 0


def test_who_rested_before_costs_were_known_gives_way_once_they_are():
    policy = make_policy(pool_blocks=100, headroom=0.0, patience=0.5)
    policy.on_arrival(arrival("busy", prompt(9, 10), "busy"), 0.0)
    run_call(policy, arrival("a", prompt(1, 60), "s"), [], 0.0)
    learn_costs(policy)
    policy.on_arrival(arrival("b", prompt(2, 60), "t"), 1.0)
    assert policy.on_step(2.0) == []
    # Its return is in doubt by now: it is judged anew.
    assert policy.on_step(20.0) == ["b"]
    assert policy.state()["gave_way"] == 1
    check_integrity(policy)


def test_who_is_between_two_calls_has_not_gone_on_yet():
    policy = make_policy(pool_blocks=10_000)
    for number in range(8):
        call = arrival(f"c{number}", prompt(number, 5), f"s{number}", last=True)
        run_call(policy, call, [], 0.0)
    expected = policy.classes.everyone.remaining_calls(1)
    assert expected < 35.0
    for number in range(8, 50):
        run_call(policy, arrival(f"c{number}", prompt(number, 5), f"s{number}"), [], 0.0)
    assert policy.classes.everyone.remaining_calls(1) == expected
    policy.on_arrival(arrival("more", [*prompt(9, 5), 1], "s9"), 1.0)
    assert policy.classes.everyone.remaining_calls(1) > expected


def play_plain(policy, count: int, continued: float) -> float:
    """So many plain requests, each of a class of its own, a share of which begins a later one."""
    now, owed = 0.0, 0.0
    for number in range(count):
        now += 1.0
        text = prompt(100 + number, 3)
        run_call(policy, arrival(f"p{number}", text), [1] * BLOCK, now)
        owed += continued
        if owed >= 1.0:
            owed -= 1.0
            longer = [*text, *[2] * BLOCK]
            run_call(policy, arrival(f"q{number}", longer), [3] * BLOCK, now + 0.5)
    return now


def session_of(policy, first_call: str):
    (session,) = (s for key, s in policy.table.sessions.items() if key[1].endswith(first_call))
    return session


@pytest.mark.parametrize("continued, known", [(0.2, False), (0.9, True)])
def test_where_few_requests_are_continued_one_that_is_makes_no_workflow(continued, known):
    policy = make_policy(pool_blocks=10_000)
    now = play_plain(policy, 60, continued)
    text = prompt(1, 3)
    for number in range(4):
        run_call(policy, arrival(f"a{number}", text), [1] * BLOCK, now + number)
        workflow = session_of(policy, "a0").workflow
        assert workflow.known is workflow.resident is (known and number > 0)
        text = [*text, *[2] * BLOCK]
    # Four times is no chance.
    run_call(policy, arrival("a4", text), [1] * BLOCK, now + 4)
    assert workflow.known and workflow.resident
    assert workflow is session_of(policy, "a0").workflow
    check_integrity(policy)


def test_an_answer_that_is_sent_back_makes_a_workflow_among_any_requests():
    policy = make_policy(pool_blocks=10_000)
    now = play_plain(policy, 60, 0.0)
    context = run_call(policy, arrival("a", prompt(1, 3)), [1] * BLOCK, now)
    policy.on_arrival(arrival("b", [*context, 2]), now + 1.0)
    assert session_of(policy, "a").workflow.known


def test_agents_without_ids_are_known_by_their_like_whatever_else_is_served():
    policy = make_policy(pool_blocks=100_000)
    now = play_plain(policy, 100, 0.1)
    system = prompt(1, 5)
    for number in range(40):
        text = [*system, *prompt(1000 + number, 2)]
        for step in range(3):
            run_call(policy, arrival(f"agent{number}-{step}", text), [5] * BLOCK, now + step)
            text = [*text, *[6 + step] * BLOCK]
        now += 5.0
    policy.on_arrival(arrival("first", [*system, *prompt(5000, 2)]), now)
    assert policy.calls["first"].context.session.workflow.known
    check_integrity(policy)
