"""The router's placement and stealing over simulated engines: real schedulers, real reports."""

from __future__ import annotations

import random

import pytest
from agents import SMALL, agent, many

from vllm_saga.router.placement import make_placer
from vllm_saga.simulator import command, policies, result, runner
from vllm_saga.simulator.cluster import Cluster, Setup
from vllm_saga.simulator.placement import PLACEMENTS
from vllm_saga.simulator.routed import Routed, arrival_of, report_of
from vllm_saga.simulator.trace import TraceError


def uneven(count):
    """One in ten makes ten times as many calls as the others; at first all look the same."""
    rng = random.Random(5)
    return [
        agent(number, calls=40 if number % 10 == 3 else rng.randint(2, 5), first=900, group="a")
        for number in range(count)
    ]


def play(sessions, placement, policy="saga", replicas=3, **options):
    """All sessions arrive within a second."""
    arrivals = [0.5 * number / len(sessions) for number in range(len(sessions))]
    setup = Setup(
        sessions, SMALL, PLACEMENTS[placement], arrivals_s=arrivals, replicas=replicas, **options
    )
    return result.summarise(runner.run_setup(setup, policy))


def test_stealing_pays_where_the_long_sessions_lie_unevenly():
    sessions = uneven(90)
    still, steals = (play(sessions, name) for name in ("saga-nosteal", "saga"))
    assert still["notes"]["moves"] == 0 and still["notes"]["co_location"] == 1.0
    assert 0 < steals["notes"]["moves"] < 90
    assert steals["notes"]["co_location"] > 0.98
    assert steals["task_completion_s"]["mean"] < still["task_completion_s"]["mean"]
    assert steals["notes"]["load_max_over_mean"] < still["notes"]["load_max_over_mean"]
    assert steals["unfinished"] == 0


@pytest.mark.parametrize("policy", ["vllm", "saga-lineage", "thunderagent"])
def test_it_serves_engines_that_say_less(policy):
    made = play(many(24), "saga", policy=policy)
    assert made["unfinished"] == 0
    assert made["notes"]["co_location"] > 0.8


def test_the_placer_learns_who_is_there_and_forgets_nobody_who_is():
    setup = Setup(many(24), SMALL, PLACEMENTS["saga"], lanes=16, replicas=2)
    cluster = Cluster(setup, policies.maker("saga"))
    cluster.run(until_s=12.0)
    assert isinstance(cluster.placement, Routed)
    placer = cluster.placement.placer
    alive = [session for session in cluster.sessions if session.finished_s is None]
    assert alive
    for session in alive:
        for call in session.calls:
            if call is not None and call.finished_s is None and call.submitted_s >= 0:
                known = placer.sessions.get(("", session.id))
                assert known.home.replica.name == str(call.replica)
                assert call.id in placer.replicas[str(call.replica)].calls


def test_reports_are_the_engines_own():
    setup = Setup(many(24), SMALL, PLACEMENTS["saga"], lanes=24, replicas=1)
    cluster = Cluster(setup, policies.maker("saga"))
    cluster.run(until_s=6.0)
    report = report_of(cluster.replicas[0], 6.0)
    saga = cluster.replicas[0].scheduler.saga
    assert report.kv_tokens == pytest.approx(0.98 * SMALL.kv_tokens, rel=0.01)
    # Calls that run may outgrow what they were let in for.
    assert 0.8 * report.kv_tokens < report.used_tokens < 1.2 * report.kv_tokens
    assert report.resident == len(saga.residency.residents) > 0
    assert len(report.held_calls) == saga.residency.held_calls > 0
    waits = [call.held_s for call in report.held_calls]
    assert waits == sorted(waits, reverse=True)
    assert report.sessions
    stock = Cluster(setup, policies.maker("vllm"))
    stock.run(until_s=6.0)
    report = report_of(stock.replicas[0], 6.0)
    assert report.kv_tokens == SMALL.kv_tokens and not report.held_calls
    assert report.running > 0 and report.used_tokens > 0


def test_sticky_is_the_router_s_policy_session():
    setup = Setup(many(20), SMALL, PLACEMENTS["sticky"], lanes=20, replicas=3)
    cluster = Cluster(setup, policies.maker("vllm"))
    cluster.run()
    placer = make_placer("session")
    for name in "012":
        placer.add(name)
    for session in cluster.sessions:
        chosen = placer.place(arrival_of(session.calls[0]), 0.0)
        assert {str(call.replica) for call in session.calls} == {chosen.replica}


def test_workloads_can_be_mixed():
    sessions, count = command.load_workload("builtin:swe+web", 10)
    assert count == 10
    assert len(sessions) == 20
    assert sum(session.session_id.startswith("web") for session in sessions) == 10
    with pytest.raises(TraceError, match="nonsense"):
        command.load_workload("builtin:swe+nonsense", 10)
