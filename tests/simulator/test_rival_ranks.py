"""Which cached context dies first: fixed time to live, KVFlow, farthest next use."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest
from agents import SMALL, agent, many

from vllm_saga.policy.retention import DEAD
from vllm_saga.simulator.cluster import Cluster, Setup
from vllm_saga.simulator.placement import least_loaded
from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.policies.farthest_next_use import FarthestNextUse, Reuse
from vllm_saga.simulator.policies.fixed_ttl import FixedTTL
from vllm_saga.simulator.policies.kvflow import HOLD_STEP, KVFlow
from vllm_saga.simulator.policies.saga_paper import SagaPaper
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread
from vllm_saga.simulator.trace import Call, Session

TIGHT = msgspec.structs.replace(SMALL, kv_tokens=8_000)
STEP = 1e9
#: Main agent, two calls of a sub-agent, main agent again. 2 s, 3 s gap, 1 s, 0.5 s to the join.
FORK = Session(
    "fork",
    (
        Call(640, 640, 32, gap="subagents"),
        Call(320, 320, 16, agent="sub", kind="root", deps=(0,), delay_s=0.0, llm_s=2.0,
             tool_latency_s=3.0),
        Call(400, 64, 16, agent="sub", llm_s=1.0, gap="end"),
        Call(700, 28, 16, parent=0, deps=(0, 2), delay_s=0.5, tool_latency_s=4.0),
        Call(300, 300, 16, kind="root"),
    ),
)  # fmt: skip


class Bench:
    """A policy on a made-up cluster: the calls of traces are issued and finished by hand."""

    def __init__(self, make):
        self.now = 0.0
        self.policy = make(
            ClusterView(
                replicas=1,
                kv_tokens=SMALL.kv_tokens,
                hardware=SMALL,
                now=lambda: self.now,
                in_flight=lambda: [0],
                kv_in_use=lambda replica: (0, 0),
                submit=lambda call: None,
                move=lambda call, to: False,
            )
        )

    def start(self, described):
        session = LiveSession(described.session_id, described, 0, self.now)
        session.calls = [None] * len(described.calls)
        return session

    def issue(self, session, index, at):
        self.now = at
        name = session.trace.calls[index].agent
        thread = session.threads.setdefault(name, Thread(session, name))
        call = LiveCall(f"{session.id}#{index}", thread, index, at, replica=0, submitted_s=at)
        session.calls[index] = thread.call = call
        self.policy.on_submit(call)
        return call

    def finish(self, call, at):
        self.now = call.finished_s = at
        thread = call.thread
        thread.call, thread.last = None, call
        rest = call.session.trace.calls[call.index + 1 :]
        thread.ended = all(later.agent != thread.agent for later in rest)
        self.policy.on_finish(call)

    def do(self, session, index, at, until):
        call = self.issue(session, index, at)
        self.finish(call, until)
        return call.thread


def play(make, sessions, lanes=8, machine=TIGHT, **options):
    """A finished run."""
    cluster = Cluster(Setup(sessions, machine, least_loaded, lanes=lanes, **options), make)
    cluster.run()
    assert all(session.finished_s is not None for session in cluster.sessions)
    return cluster


def recomputed(cluster):
    """Tokens whose KV existed once and was computed again."""
    calls = [call for session in cluster.sessions for call in session.calls[1:]]
    return sum(max(call.spec.reusable_tokens - call.cached_tokens, 0) for call in calls)


def times(cluster):
    return [call.finished_s for session in cluster.sessions for call in session.calls]


# -- farthest next use ------------------------------------------------------------------------


def test_the_next_use_is_the_end_of_the_gap():
    bench = Bench(FarthestNextUse)
    session = bench.start(agent(0, gap=4.0))
    thread = bench.do(session, 0, at=0.0, until=10.0)
    assert bench.policy.keep_rank(thread) == (3, -14.0)
    # The same moment, however much later one asks.
    bench.now = 13.0
    assert bench.policy.keep_rank(thread) == (3, -14.0)


def test_a_waiting_call_uses_its_context_at_once_the_longest_waiting_first():
    bench = Bench(FarthestNextUse)
    ranks = []
    for number, issued in enumerate((14.0, 16.0)):
        session = bench.start(agent(number, gap=4.0))
        thread = bench.do(session, 0, at=0.0, until=issued - 4.0)
        bench.issue(session, 1, at=issued)
        bench.now = 20.0
        ranks.append(bench.policy.keep_rank(thread))
    back_in_1_s = bench.do(bench.start(agent(2, gap=1.0)), 0, at=18.0, until=20.0)
    assert ranks == [(3, -14.0), (3, -16.0)]
    assert bench.policy.keep_rank(back_in_1_s) < ranks[1] < ranks[0]


def test_a_context_that_no_later_call_extends_dies_first():
    bench = Bench(FarthestNextUse)
    session = bench.start(FORK)
    bench.do(session, 0, 0.0, 1.0)
    bench.do(session, 1, 1.0, 3.0)
    sub = bench.do(session, 2, 6.0, 7.0)
    assert bench.policy.keep_rank(sub) == DEAD
    main = bench.do(session, 3, 7.5, 9.0)
    # What follows is new from its first token on.
    assert not main.ended and bench.policy.keep_rank(main) == DEAD


def test_a_parent_is_used_when_its_sub_agents_can_have_ended():
    bench = Bench(FarthestNextUse)
    session = bench.start(FORK)
    main = bench.do(session, 0, 0.0, 1.0)
    # Alone: 2 s of the first, 3 s gap, 1 s of the second, 0.5 s.
    assert bench.policy.keep_rank(main) == (3, -7.5)
    first = bench.issue(session, 1, at=1.5)
    assert bench.policy.keep_rank(main) == (3, -8.0)
    bench.finish(first, 5.0)
    assert bench.policy.keep_rank(main) == (3, -9.5)
    # Passed without it: from now on at any moment.
    bench.now = 12.0
    assert bench.policy.keep_rank(main) == (3, -12.0)


def test_only_the_front_that_is_asked_for_again_counts():
    calls = (
        Call(640, 640, 32),
        Call(700, 28, 20),
        Call(400, 80, 20, kind="branch"),
        Call(700, 100, 20, kind="branch", parent=1),
        Call(300, 300, 20, kind="root"),
    )
    reuse = Reuse(Session("edits", calls), block_size=16)
    assert reuse.users == [[1], [2, 3], [3], [], []]
    # Call 2 kept 320 tokens of call 1, so call 3 finds no more than these in it.
    assert reuse.tokens == [672, 600, 320, 0, 0]


@pytest.mark.parametrize("pool", [6_000, 8_000, 12_000])
@pytest.mark.parametrize("overlapping", [False, True])
def test_farthest_next_use_recomputes_no_more_than_stock(pool, overlapping):
    machine = msgspec.structs.replace(SMALL, kv_tokens=pool)
    sessions = [*many(12), *map(edited, range(4)), *map(forked, range(4))]
    options = {"machine": machine, "overlapping": overlapping}
    stock = recomputed(play(Policy, sessions, **options))
    assert recomputed(play(FarthestNextUse, sessions, **options)) <= stock
    assert stock > 0 or pool == 12_000


def edited(number, gap=1.0):
    """An agent that replaces the newer half of its context at every step."""
    calls = [
        Call(800, 800 if step == 0 else 400, 30, kind="branch" if step else None,
             tool_latency_s=gap)
        for step in range(8)
    ]  # fmt: skip
    return Session(f"edited-{number}", tuple(calls))


def forked(number):
    return msgspec.structs.replace(FORK, session_id=f"fork-{number}")


def test_what_no_call_will_find_is_given_up_before_what_one_will():
    # 400 of 830 tokens of each are used again: eight times that fits, eight contexts do not.
    sessions = [edited(number, gap=4.0) for number in range(8)]
    options = {
        "machine": msgspec.structs.replace(SMALL, kv_tokens=5_200),
        "arrivals_s": [0.5 * number for number in range(8)],
    }
    assert recomputed(play(Policy, sessions, **options)) > 2_000
    assert recomputed(play(FarthestNextUse, sessions, **options)) == 0


# -- KVFlow -----------------------------------------------------------------------------------


def test_steps_to_execution_along_a_fork():
    bench = Bench(KVFlow)
    session = bench.start(FORK)
    main = bench.do(session, 0, 0.0, 1.0)
    # The sub-agent's two calls come before.
    assert bench.policy.keep_rank(main) == (3, 1.0 - 3 * STEP)
    sub = bench.do(session, 1, 1.0, 3.0)
    assert bench.policy.keep_rank(main) == (3, 1.0 - 2 * STEP)
    assert bench.policy.keep_rank(sub) == (3, 3.0 - 1 * STEP)
    second = bench.issue(session, 2, 6.0)
    assert bench.policy.keep_rank(main) == (3, 1.0 - 1 * STEP)
    assert bench.policy.keep_rank(sub) == (3, -6.0)
    bench.finish(second, 7.0)
    assert bench.policy.keep_rank(main) == (3, 1.0 - 1 * STEP)
    # Ended: as far as an agent that the graph does not name.
    assert bench.policy.keep_rank(sub) == (3, 7.0 - (HOLD_STEP + 1) * STEP)


def test_steps_beyond_the_hold_level_are_all_the_same():
    sub = tuple(
        Call(320, 320 if k == 0 else 16, 16, agent="sub", deps=(k,), delay_s=0.0) for k in range(9)
    )
    calls = (Call(640, 640, 32), *sub, Call(700, 28, 16, parent=0, deps=(0, 9)))
    bench = Bench(KVFlow)
    session = bench.start(Session("long", calls))
    main = bench.do(session, 0, 0.0, 1.0)
    assert bench.policy.keep_rank(main) == (3, 1.0 - (HOLD_STEP + 1) * STEP)


def test_among_chains_it_is_lru_that_spares_waiting_calls():
    bench = Bench(KVFlow)
    older, newer, waiting = (bench.start(agent(number)) for number in range(3))
    of_waiting = bench.do(waiting, 0, 0.0, 1.0)
    of_older = bench.do(older, 0, 0.0, 2.0)
    of_newer = bench.do(newer, 0, 0.0, 3.0)
    bench.issue(waiting, 1, 4.0)
    order = sorted([of_newer, of_waiting, of_older], key=bench.policy.keep_rank)
    assert order == [of_older, of_newer, of_waiting]


# -- fixed time to live -----------------------------------------------------------------------


@pytest.mark.parametrize(("ttl_s", "kept"), [(0.5, False), (10.0, True)])
def test_a_context_outlives_younger_ones_for_as_long_as_said(ttl_s, kept):
    # The first session is away from 1.2 s to 7.2 s; from 3 s on others want more than there is.
    sessions = [agent(0, calls=2, first=6_000, gap=6.0)]
    sessions += [agent(number, calls=2, first=3_000, gap=20.0) for number in range(1, 7)]
    arrivals = [0.0] + [3.0] * 6
    cluster = play(partial(FixedTTL, ttl_s=ttl_s), sessions, machine=SMALL, arrivals_s=arrivals)
    returning = cluster.sessions[0].calls[1]
    assert (returning.cached_tokens > 6_000) is kept


# -- whole runs -------------------------------------------------------------------------------

RIVALS = {
    "fixed-ttl": partial(FixedTTL, ttl_s=2.0),
    "kvflow": KVFlow,
    "farthest-next-use": FarthestNextUse,
    "saga-paper": SagaPaper,
    "saga-paper, experienced": partial(SagaPaper, history=many(40)),
}


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("rival", RIVALS)
def test_every_session_ends_and_the_same_way_twice(rival, overlapping):
    sessions = [*many(8), *map(edited, range(4)), *map(forked, range(4))]
    assert recomputed(play(Policy, sessions, overlapping=overlapping)) > 0
    once, again = (play(RIVALS[rival], sessions, overlapping=overlapping) for _ in range(2))
    assert times(once) == times(again)


@pytest.mark.parametrize("rival", RIVALS)
def test_several_engines_and_arrivals_over_time(rival):
    sessions = many(16)
    arrivals = [0.2 * number for number in range(len(sessions))]
    play(RIVALS[rival], sessions, lanes=None, arrivals_s=arrivals, replicas=3)


@pytest.mark.parametrize("rival", RIVALS)
def test_without_pressure_nothing_is_computed_twice(rival):
    roomy = msgspec.structs.replace(SMALL, kv_tokens=200_000)
    sessions = many(8)
    assert recomputed(play(RIVALS[rival], sessions, machine=roomy)) == recomputed(
        play(Policy, sessions, machine=roomy)
    )
