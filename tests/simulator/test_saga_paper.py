"""SAGA as published: its cache, its fairness, and its engines."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
from agents import SMALL, agent, many
from vllm.v1.core.sched.request_queue import PriorityRequestQueue

from vllm_saga.policy.retention import DEAD
from vllm_saga.simulator.cluster import Cluster, Setup
from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.placement import least_loaded
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.ranked import RankedPolicy, RankedScheduler
from vllm_saga.simulator.policies.saga_paper import SagaPaper, balance
from vllm_saga.simulator.policies.saga_paper.fairness import AgentFairShare, reorder
from vllm_saga.simulator.policies.saga_paper.formulas import COLD_START
from vllm_saga.simulator.policies.saga_paper.graph import Run
from vllm_saga.simulator.policies.saga_paper.memory import Memory, Resident
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread
from vllm_saga.simulator.schedulers import make_scheduler
from vllm_saga.simulator.trace import Call, Session


class World:
    """The cluster as a policy sees it, with everything set by hand."""

    def __init__(self, replicas=1):
        self.now, self.kv = 0.0, [(0, 0)] * replicas
        self.view = ClusterView(
            replicas=replicas,
            kv_tokens=1_000,
            hardware=SMALL,
            now=lambda: self.now,
            in_flight=lambda: [0] * replicas,
            kv_in_use=lambda replica: self.kv[replica],
            submit=lambda call: None,
            move=lambda call, to: False,
        )


def live(name, tenant=None, arrival_s=0.0):
    described = Session(name, agent(0).calls, tenant=tenant)
    return LiveSession(name, described, 0, arrival_s)


def thread(name="s", idle_since=0.0, tokens=100, waiting_since=None):
    """A thread whose last call left so much, and whose next call may wait already."""
    session = live(name)
    made = Thread(session, None)
    spec = Call(tokens - 10, tokens - 10, 10)
    made.last = SimpleNamespace(finished_s=idle_since, spec=spec)
    if waiting_since is not None:
        made.call = LiveCall(f"{name}#1", made, 1, waiting_since)
    session.threads[None] = made
    return made


# -- cache ------------------------------------------------------------------------------------


def ranked(policy, *threads):
    """The threads in the order in which their contexts would die."""
    owners = [SimpleNamespace(thread=t, dead=False) for t in threads]
    ranks = policy._keep_ranks(owners)
    return [t for _, t in sorted(zip(ranks, threads, strict=True), key=lambda pair: pair[0])]


def keep(policy, of, reuse, ttl=0.0):
    resident = Resident(of, 0, of.context_tokens, of.context_tokens, reuse)
    resident.expires_s = of.idle_since + ttl if ttl else 0.0
    policy._memory.keep(resident)


def test_wa_lru_weighs_age_reuse_and_size():
    world = World()
    policy = SagaPaper(world.view)
    young, old = thread("young", 90.0), thread("old", 0.0)
    sure, big = thread("sure", 0.0), thread("big", 0.0, tokens=400)
    for each, reuse in ((young, 0.5), (old, 0.5), (sure, 0.9), (big, 0.5)):
        keep(policy, each, reuse)
    world.now = 100.0
    assert ranked(policy, young, sure, old, big) == [big, old, sure, young]
    policy._keep_ranks([SimpleNamespace(thread=t, dead=False) for t in (young, old, sure, big)])
    assert policy.keep_rank(young)[1] == pytest.approx(-(0.3 * 0.1 + 0.5 * 0.5 + 0.2 * 0.25))


def test_contexts_in_their_time_to_live_and_those_called_for_outlive_the_score():
    world = World()
    policy = SagaPaper(world.view)
    unknown, waiting = thread("unknown", 50.0), thread("waiting", 0.0, waiting_since=60.0)
    protected, free = thread("protected", 0.0), thread("free", 50.0)
    keep(policy, unknown, None)
    keep(policy, waiting, 0.1)
    keep(policy, protected, 0.1, ttl=80.0)
    keep(policy, free, 0.9)
    world.now = 70.0
    assert ranked(policy, protected, waiting, free, unknown)[:2] == [unknown, free]
    ended = thread("ended", 69.0)
    assert policy.keep_rank(ended) == DEAD


def test_before_anything_is_known_it_is_lru():
    world = World()
    policy = SagaPaper(world.view)
    first, big = thread("first", 1.0), thread("big", 2.0, tokens=900)
    last = thread("last", 3.0)
    for each in (first, big, last):
        keep(policy, each, None)
    world.now = 10.0
    assert ranked(policy, last, big, first) == [first, big, last]


def test_expired_contexts_are_dropped_only_while_memory_is_short():
    world = World()
    memory = Memory(world.view)
    first, second = thread("first", tokens=300), thread("second", tokens=300)
    for of, ttl in ((first, 5.0), (second, 6.0)):
        memory.keep(Resident(of, 0, 300, 200, 0.5, expires_s=ttl))
    world.kv = [(200, 600)]
    assert memory.protected_tokens == [400]
    assert memory.used_fraction(0) == 0.6
    world.now = 7.0
    memory.expire(0)
    assert memory.protected_tokens == [0]
    assert not memory.get(first).dropped and not memory.get(second).dropped
    # Now 0.9: the one that expired first goes, and 0.6 is left.
    memory.keep(Resident(thread("third", tokens=300), 0, 300, 300, 0.5))
    world.kv = [(200, 800)]
    memory.expire(0)
    assert memory.get(first).dropped and not memory.get(second).dropped
    assert memory.used_fraction(0) == 0.6


def test_a_context_is_in_use_from_the_arrival_of_its_next_call():
    world = World()
    memory = Memory(world.view)
    returning = thread(tokens=900)
    memory.keep(Resident(returning, 0, 900, 900, 0.5, expires_s=5.0))
    world.kv = [(0, 900)]
    returning.call = LiveCall("s#1", returning, 1, 4.0)
    memory.returned(returning, 0)
    assert memory.protected_tokens == [0]
    world.now = 50.0
    memory.expire(0)
    assert not memory.get(returning).dropped
    memory.release(returning)
    assert memory.get(returning) is None and memory.used_fraction(0) == 0.0


# -- Agent Fair Share -------------------------------------------------------------------------


class Known:
    """An agent type of which everything takes 10 s of work a step, and 100 s in all."""

    expected_completion_s, step_work_s = 100.0, 10.0

    def work_left_s(self, done):
        return 10.0 * (5 - done)


def fair_share(*tasks):
    """(session, steps done) → Agent Fair Share after these steps."""
    share = AgentFairShare(SimpleNamespace(knowledge=lambda run: Known()))
    for session, steps in tasks:
        share.runs(session)[None] = Run((), steps=steps)
        share.progressed(session)
    return share


def test_tenants_go_by_the_sum_over_their_tasks_and_tasks_by_their_term():
    # At 50 s: work left over the 100 s that are left is .5, .4, and .3.
    heavy, light = live("heavy", "one"), live("light", "one")
    single = live("single", "two")
    share = fair_share((heavy, 2), (light, 3), (single, 1))
    share.update(50.0)
    assert [share.rank(s, 50.0) for s in (heavy, light, single)] == [0, 1, 2]
    share.end(light)
    share.update(50.0)
    assert [share.rank(s, 50.0) for s in (single, heavy)] == [0, 1]


def test_an_overdue_task_has_one_step_of_slack_left():
    overdue, urgent = live("overdue"), live("urgent", arrival_s=851.0)
    share = fair_share((overdue, 3), (urgent, 1))
    # 20 s of work in 10 s, against 40 s in 1 s that also count as 10.
    share.update(1000.0)
    assert [share.rank(s, 1000.0) for s in (urgent, overdue)] == [0, 1]


def test_unknown_agents_share_a_rank():
    share = AgentFairShare(SimpleNamespace(knowledge=lambda run: None))
    sessions = [live("a", "one"), live("b", "two")]
    for session in sessions:
        share.runs(session)[None] = Run(())
        share.progressed(session)
    assert [share.rank(s, 10.0) for s in sessions] == [0, 0]


def test_the_queue_follows_new_priorities():
    queue = PriorityRequestQueue()
    requests = {n: make_request(n, [1] * 8, 1, arrival_time=float(k)) for k, n in enumerate("abc")}
    for request in requests.values():
        queue.add_request(request)
    scheduler = SimpleNamespace(waiting=queue, requests=requests)
    reorder(scheduler, {"a": 2, "b": 1, "c": 1})
    assert [request.request_id for request in queue] == ["b", "c", "a"]
    reorder(scheduler, {"a": 0, "b": 1, "c": 1})
    assert [request.request_id for request in queue] == ["a", "b", "c"]


# -- engines ----------------------------------------------------------------------------------


def balancer(counts, used=(0.0, 0.0)):
    world = World(replicas=2)
    made = balance.Balancer(world.view, used.__getitem__)
    for replica, pair in enumerate(counts):
        made.attach(replica, SimpleNamespace(get_request_counts=lambda pair=pair: pair))
    return world, made


def test_a_session_stays_where_its_kv_is_until_that_engine_is_overloaded():
    call = LiveCall("s#0", thread(), 0, 0.0)
    _, made = balancer([(3, 0), (0, 0)])
    assert made.route(call, lambda session, replica: False) == 1
    made.attach(1, SimpleNamespace(get_request_counts=lambda: (16, 25)))
    assert made.route(call, lambda session, replica: True) == 1
    made.attach(1, SimpleNamespace(get_request_counts=lambda: (16, 30)))
    assert made.route(call, lambda session, replica: True) == 0
    _, made = balancer([(3, 0), (0, 0)])
    made.route(call, lambda session, replica: True)
    made.attach(1, SimpleNamespace(get_request_counts=lambda: (9, 0)))
    assert made.route(call, lambda session, replica: False) == 0


def test_the_oldest_pending_session_of_an_overloaded_engine_is_taken_after_its_kv():
    world, made = balancer([(8, 2), (1, 0)])
    begun, oldest, younger = (thread(name, waiting_since=0.0).call for name in "bcd")
    begun.cached_tokens = 0
    for call in (begun, oldest, younger):
        call.replica = 0
        made.submitted(call)
    assert made.balance() == []
    world.now = 0.1
    assert made.balance() == []
    world.now = 0.3
    arrived = made.balance()
    assert arrived[0] == (oldest, 1)
    assert made.route(oldest, lambda session, replica: True) == 1


def test_engines_under_equal_load_leave_each_other_alone():
    world, made = balancer([(8, 2), (7, 0)])
    call = thread(waiting_since=0.0).call
    call.replica = 0
    made.submitted(call)
    for _ in range(10):
        world.now += 0.1
        assert made.balance() == []


def test_the_kv_of_a_moved_call_is_found_where_it_moved():
    class Owner:
        dead = False

    policy = RankedPolicy(World(replicas=2).view)
    engines = []
    for replica in range(2):
        scheduler = make_scheduler(RankedScheduler, blocks=40)
        policy.attach(replica, scheduler)
        engines.append(Driver(scheduler))
    source, target = engines
    tokens = [7 * k % 400 + 50 for k in range(330)]
    source.add(make_request("before", tokens[:320], 2))
    source.drain(50)
    target.add(make_request("front", tokens[:64], 2))
    target.drain(50)
    target.add(make_request("moved", tokens, 2))
    balance.copy_prefix("moved", source.scheduler, target.scheduler, Owner())
    assert target.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 39
    [new] = target.step().scheduled_new_reqs
    assert new.num_computed_tokens == 320
    target.drain(50)


def test_sessions_are_stolen_and_all_of_them_end():
    class Watched(SagaPaper):
        moved = 0

        def _move(self, call, to):
            source = call.replica
            super()._move(call, to)
            self.moved += call.replica == to != source

    # One engine gets the long sessions, by order of arrival.
    sessions = [
        agent(number, calls=20 if number % 2 else 2, gap=0.05, output=60) for number in range(16)
    ]
    machine = msgspec.structs.replace(SMALL, max_num_seqs=2)
    arrivals = [0.01 * number for number in range(16)]
    make = partial(Watched, history=many(COLD_START))
    cluster = Cluster(Setup(sessions, machine, least_loaded, arrivals_s=arrivals, replicas=2), make)
    cluster.run()
    assert cluster.policy.moved > 0
    assert all(session.finished_s is not None for session in cluster.sessions)


def test_new_calls_wait_for_contexts_in_their_time_to_live():
    # Away from 1.3 s to 7.3 s, and no longer than its kind ever was.
    sessions = [agent(0, calls=3, first=6_000, gap=6.0)]
    sessions += [agent(number, calls=1, first=3_000) for number in range(1, 7)]
    arrivals = [0.0] + [3.0] * 6
    for history, kept in (((), False), ([sessions[0]] * COLD_START, True)):
        cluster = Cluster(
            Setup(sessions, SMALL, least_loaded, arrivals_s=arrivals),
            partial(SagaPaper, history=history),
        )
        cluster.run()
        assert (cluster.sessions[0].calls[1].cached_tokens > 6_000) is kept
