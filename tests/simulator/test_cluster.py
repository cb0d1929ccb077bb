"""The simulation itself: real schedulers, exact content, exact time, nothing lost."""

from __future__ import annotations

import msgspec
import pytest
from agents import SMALL, agent, many

from vllm_saga.simulator import policies, result, runner
from vllm_saga.simulator.cluster import Cluster, Setup, Stuck
from vllm_saga.simulator.load import Closed
from vllm_saga.simulator.placement import PLACEMENTS, least_loaded
from vllm_saga.simulator.policies.base import Policy
from vllm_saga.simulator.policies.saga import Saga
from vllm_saga.simulator.replica import PolicyFailed
from vllm_saga.simulator.trace import Call, Session


def run(sessions, policy="vllm", lanes=8, machine=SMALL, **options):
    cluster = Cluster(
        Setup(sessions, machine, least_loaded, lanes=lanes, **options), policies.maker(policy)
    )
    cluster.run()
    return cluster


def experiment(sessions, lanes=8, **options):
    return runner.Experiment(tuple(sessions), Closed(lanes), SMALL, len(sessions), **options)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_session_alone_takes_what_the_cost_model_says(overlapping):
    session = agent(0, first=1500, output=40)
    cluster = run([session], overlapping=overlapping)
    assert cluster.sessions[0].finished_s == pytest.approx(
        runner.isolated_s(session, SMALL), rel=0.01
    )


@pytest.mark.parametrize("policy", ["vllm", "saga", "saga-lineage"])
def test_prefixes_hit_exactly_where_the_trace_says(policy):
    cluster = run(many(6), policy, lanes=2, machine=_with_pool(200_000))
    for session in cluster.sessions:
        for call in session.calls:
            # The last token of an answer is never computed, so its block is not cached.
            reusable = max(call.spec.reusable_tokens - 1, 0) if call.index else 0
            assert call.cached_tokens == reusable // 16 * 16


def test_sessions_of_a_group_share_their_prefix_and_copies_share_nothing_else():
    cluster = run([agent(0, group="a"), agent(1, group="a"), agent(2, group="b")], lanes=1)
    assert [session.calls[0].cached_tokens for session in cluster.sessions] == [0, 320, 0]


def test_an_edited_context_keeps_its_front_only():
    calls = (
        Call(prompt_tokens=640, new_tokens=640, output_tokens=32, tool_latency_s=0.0),
        Call(prompt_tokens=700, new_tokens=540, output_tokens=8, kind="branch", tool_latency_s=0.0),
        Call(prompt_tokens=900, new_tokens=192, output_tokens=8),
    )
    cluster = run([Session("edits", calls)])
    assert [call.cached_tokens for call in cluster.sessions[0].calls] == [0, 160, 704]


def test_calls_wait_for_their_dependencies_and_their_gap():
    calls = (
        Call(prompt_tokens=200, new_tokens=200, output_tokens=5, gap="subagents"),
        Call(100, 100, 50, deps=(0,), agent="x", delay_s=1.0),
        Call(100, 100, 5, deps=(0,), agent="y", delay_s=0.5),
        Call(230, 25, 5, parent=0, deps=(1, 2), delay_s=0.25),
    )
    session = run([Session("family", calls)]).sessions[0]
    first, x, y, last = session.calls
    assert x.issued_s == pytest.approx(first.finished_s + 1.0)
    assert y.issued_s == pytest.approx(first.finished_s + 0.5)
    assert last.issued_s == pytest.approx(max(x.finished_s, y.finished_s) + 0.25)
    assert last.cached_tokens == 192
    assert set(session.threads) == {None, "x", "y"}


def test_open_loop_sessions_arrive_when_told():
    arrivals = [0.0, 1.5, 1.5, 40.0]
    cluster = run(many(4), lanes=None, arrivals_s=arrivals)
    assert [session.arrival_s for session in cluster.sessions] == arrivals
    assert all(session.lane is None for session in cluster.sessions)


@pytest.mark.parametrize("policy", policies.PLAIN)
@pytest.mark.parametrize("overlapping", [False, True])
def test_every_policy_finishes_all_work_under_pressure(policy, overlapping):
    cluster = run(many(24), policy, lanes=12, overlapping=overlapping)
    assert len(cluster.sessions) == 24
    for session in cluster.sessions:
        assert session.finished_s is not None
        assert [call.index for call in session.calls] == list(range(len(session.trace.calls)))
    for replica in cluster.replicas:
        assert not replica.scheduler.has_unfinished_requests()
        pool = replica.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize("policy", ["vllm", "saga"])
def test_the_same_run_twice_gives_the_same_numbers(policy):
    def numbers():
        made = result.summarise(runner.run(experiment(many(16), lanes=12), policy, 3))
        return {key: value for key, value in made.items() if key not in result.TIMING_FIELDS}

    assert numbers() == numbers()


def test_saga_does_nothing_while_all_fits_and_helps_when_it_does_not():
    roomy, tight = (experiment(many(24, first=1500), lanes=n) for n in (2, 14))

    def completion(question, policy):
        return result.summarise(runner.run(question, policy, 0))["task_completion_s"]["mean"]

    assert completion(roomy, "saga") == completion(roomy, "vllm")
    assert completion(tight, "vllm") > 1.3 * completion(tight, "saga")


def test_a_pool_that_holds_everything_is_the_bound():
    roomy, tight = (experiment(many(24, first=1500), lanes=n) for n in (2, 14))

    def figures(question, policy):
        made = result.summarise(runner.run(question, policy, 0))
        assert made["policy"] == policy
        return made["task_completion_s"]["mean"], made["recomputed_tokens"]

    assert figures(roomy, policies.ROOMY) == figures(roomy, "vllm")
    best_s, computed = figures(tight, policies.ROOMY)
    for policy in ("vllm", "saga"):
        took_s, again = figures(tight, policy)
        assert best_s < took_s and computed < again / 100


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_engines_share_the_work_on_one_clock(placement):
    question = experiment(many(20), lanes=10, replicas=3, placement=placement)
    cluster = Cluster(question.setup(0), policies.maker("vllm"))
    cluster.run()
    used = {call.replica for session in cluster.sessions for call in session.calls}
    assert used == {0, 1, 2}
    homes = [{call.replica for call in session.calls} for session in cluster.sessions]
    if placement in ("sticky", "least_loaded"):
        assert all(len(home) == 1 for home in homes)
    if placement == "round_robin":
        assert any(len(home) == 3 for home in homes)


def test_kv_time_adds_up():
    made = runner.run(experiment(many(24), lanes=12), "saga", 0)
    shares = result.summarise(made)["kv_time"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(0.0 <= share <= 1.0 for share in shares.values())
    assert shares["running"] > 0.05
    assert shares["held_hit"] > 0.05


class Forgetful(Policy):
    def admit(self, call):
        return call.session.number < 2


class ForgetfulClock(Forgetful):
    tick_s = 60.0


@pytest.mark.parametrize("policy", [Forgetful, ForgetfulClock])
def test_a_policy_that_forgets_calls_is_found_out(policy):
    setup = Setup(many(4), SMALL, least_loaded, lanes=4)
    with pytest.raises(Stuck, match="2 sessions are left"):
        Cluster(setup, policy).run()


class Clock(Policy):
    tick_s = 60.0


def test_an_agent_away_overnight_is_no_call_forgotten():
    calls = (Call(200, 200, 10, tool_latency_s=50_000.0, gap="human"), Call(300, 90, 10))
    cluster = Cluster(Setup([Session("s", calls)], SMALL, least_loaded, lanes=1), Clock)
    cluster.run()
    assert cluster.sessions[0].finished_s > 50_000.0


def test_a_call_larger_than_the_pool_is_refused():
    with pytest.raises(ValueError, match="does not fit the KV pool of 16000"):
        Cluster(Setup([agent(0, first=20_000)], SMALL, least_loaded), Policy)


class Mover(Policy):
    """Sends everything to engine 0 and moves what has not begun to engine 1."""

    tick_s = 0.05

    def __init__(self, cluster):
        super().__init__(cluster)
        self.moved = 0
        self.sent = []

    def replica_for(self, call):
        self.sent.append(call)
        return 0

    def on_tick(self):
        for call in self.sent:
            self.moved += self.cluster.move(call, 1)
        self.sent.clear()


def test_a_call_that_has_not_begun_can_be_moved():
    machine = msgspec.structs.replace(SMALL, max_num_seqs=1)
    cluster = Cluster(Setup(many(8), machine, least_loaded, lanes=8, replicas=2), Mover)
    cluster.run()
    assert cluster.policy.moved > 0
    assert all(session.finished_s for session in cluster.sessions)
    assert {c.replica for s in cluster.sessions for c in s.calls} == {0, 1}


def test_parallel_processes_give_what_one_process_gives():
    question = experiment(many(8), lanes=4)
    together = runner.run_all([(question, "vllm", 0), (question, "saga", 1)], processes=2)
    alone = [runner.run(question, "vllm", 0), runner.run(question, "saga", 1)]
    for one, other in zip(together, alone, strict=True):
        a, b = result.summarise(one), result.summarise(other)
        assert {k: a[k] for k in a if k not in result.TIMING_FIELDS} == {
            k: b[k] for k in b if k not in result.TIMING_FIELDS
        }


def test_the_static_cap_search_finds_a_cap_that_beats_no_cap():
    question = experiment(many(24, first=1500), lanes=14)
    cap = runner.best_static_cap(question, processes=2)

    def completion(policy):
        return result.summarise(runner.run(question, policy, 0))["task_completion_s"]["mean"]

    assert completion(f"static-cap:{cap}") < completion("vllm")


def _with_pool(tokens):
    return msgspec.structs.replace(SMALL, kv_tokens=tokens)


def test_unknown_names_say_what_there_is():
    with pytest.raises(policies.UnknownPolicy, match="saga-oracle"):
        policies.maker("nonsense")
    with pytest.raises(policies.UnknownPolicy, match="static-cap:N"):
        policies.maker("static-cap:none")


def test_a_call_reaches_the_engine_later_the_more_are_in_flight():
    slow = msgspec.structs.replace(SMALL, request_s=0.25, contention_s=0.5)
    run = Cluster(Setup([agent(k, calls=1) for k in range(3)], slow, least_loaded, lanes=3), Policy)
    run.run()
    assert [s.calls[0].submitted_s for s in run.sessions] == [0.25] * 3
    staggered = Cluster(
        Setup([agent(k, calls=1) for k in range(3)], slow, least_loaded, arrivals_s=[0, 0.3, 0.31]),
        Policy,
    )
    staggered.run()
    assert [s.calls[0].submitted_s for s in staggered.sessions] == pytest.approx([0.25, 1.05, 1.06])


def test_a_policy_that_fails_ends_the_run():
    class Faulty(Saga):
        def attach(self, replica, scheduler):
            super().attach(replica, scheduler)
            scheduler.saga.on_finish = lambda *args, **kwargs: 1 / 0

    setup = Setup(many(4), SMALL, PLACEMENTS["sticky"], lanes=2)
    with pytest.raises(PolicyFailed, match="saga's policy failed"):
        Cluster(setup, Faulty).run()
