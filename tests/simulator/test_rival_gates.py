"""ThunderAgent and Continuum keep to their own rules, and do something in a whole run."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest
from agents import agent, many
from rival_bench import SLOW, Bench, play, times

from vllm_saga.policy.retention import TimeToLive
from vllm_saga.simulator.placement import round_robin
from vllm_saga.simulator.policies import thunderagent
from vllm_saga.simulator.policies.continuum import Continuum
from vllm_saga.simulator.policies.plas import Plas
from vllm_saga.simulator.policies.thunderagent import ThunderAgent
from vllm_saga.simulator.records import LiveCall
from vllm_saga.simulator.trace import Call, Session

# -- ThunderAgent ---------------------------------------------------------------------------------


def test_thunderagent_lets_a_new_program_in_if_it_fits_with_its_buffer():
    bench = Bench(ThunderAgent)
    assert bench.issue("a", 5000)
    assert bench.issue("b", 4800)
    assert not bench.issue("c", 1)
    # Room for it in the end, but whoever waits is not overtaken.
    bench.finish("b")
    bench.end("b")
    assert not bench.issue("d", 1)
    assert sorted(bench.tick()) == ["c", "d"]


def test_thunderagent_pauses_the_smallest_acting_programs_until_the_rest_fits():
    bench = Bench(ThunderAgent)
    for name, prompt in (("small", 1000), ("large", 4000), ("middle", 2000)):
        bench.run(name, prompt)
    assert bench.issue("busy", 2000, output=2000)
    bench.finish("busy")
    assert bench.issue("busy", 4000)
    # 4,000 + 1,010 + 4,010 + 2,010 + 400: paused is 1,110, then 2,110.
    bench.tick()
    assert bench.issue("large", 4100)
    assert not bench.issue("small", 1100)
    assert not bench.issue("middle", 2100)


@pytest.mark.parametrize(("marks_count", "held"), [(True, ["b"]), (False, ["a", "b", "c"])])
def test_thunderagent_marks_reasoning_programs_to_be_paused_at_their_tool_call(marks_count, held):
    bench = Bench(partial(ThunderAgent, marks_count=marks_count))
    sizes = {"a": 3900, "b": 2900, "c": 4900}
    for name, prompt in sizes.items():
        bench.run(name, prompt // 2)
    for name, prompt in sizes.items():
        assert bench.issue(name, prompt)
    # 3,900 + 2,900 + 4,900 + 300 are 2,000 too many; nobody is acting.
    assert bench.tick() == []
    for name, prompt in sizes.items():
        bench.finish(name)
        assert bench.issue(name, prompt + 50) == (name not in held)


def test_thunderagent_resumes_waiting_calls_then_new_programs_then_acting_ones():
    bench = Bench(ThunderAgent)
    for name in ("acting", "waiting", "big"):
        bench.run(name, 1500)
    assert bench.issue("big", 9800)
    bench.tick()  # 9,900: both others are paused
    assert not bench.issue("new", 100)
    assert not bench.issue("waiting", 1600)
    order = bench.policy._in_order()
    assert [program.session.id for program in order] == ["waiting", "new", "acting"]
    bench.finish("big")
    bench.end("big")
    assert sorted(bench.tick()) == ["new", "waiting"]
    assert bench.issue("acting", 1600)


def test_thunderagent_places_the_largest_first_where_there_is_most_room():
    bench = Bench(ThunderAgent, replicas=2)
    assert bench.issue("on-0", 8000)
    assert bench.issue("on-1", 9000)
    for name, prompt in (("x", 3000), ("y", 5000), ("z", 4000)):
        assert not bench.issue(name, prompt)
    for name in ("on-0", "on-1"):
        bench.finish(name)
        bench.end(name)
    assert bench.tick() == ["y", "z", "x"]
    placed = {call.session.id: call.replica for call in bench.submitted}
    assert (placed["y"], placed["z"], placed["x"]) == (0, 1, 1)


@pytest.mark.parametrize("origin_only", [False, True])
def test_thunderagent_may_insist_on_the_backend_that_has_the_kv(origin_only):
    bench = Bench(partial(ThunderAgent, origin_only=origin_only), replicas=2)
    bench.run("mover", 3000)  # on 0
    assert bench.issue("one", 7000)  # on 1
    assert bench.issue("zero", 6500)  # on 0
    bench.finish("zero")
    assert bench.issue("zero", 8000)
    bench.tick()
    bench.finish("one")
    bench.end("one")
    assert not bench.issue("mover", 3100)
    assert bench.tick() == ([] if origin_only else ["mover"])
    bench.finish("zero")
    bench.end("zero")
    assert bench.tick() == (["mover"] if origin_only else [])
    assert bench.submitted[-1].replica == (0 if origin_only else 1)


def test_thunderagent_lets_a_call_through_after_half_an_hour():
    bench = Bench(ThunderAgent)
    assert bench.issue("a", 9900)
    assert not bench.issue("b", 5000)
    bench.now = thunderagent.FORCED_AFTER_S - 10
    assert bench.tick() == []
    assert bench.tick() == ["b"]


def test_thunderagent_forces_a_paused_program_back_to_its_own_backend():
    bench = Bench(ThunderAgent, replicas=2)
    bench.run("large", 3000)  # on 0
    assert bench.issue("other", 4000)  # on 1
    assert bench.issue("small", 100)  # on 0
    assert bench.issue("large", 9950)
    bench.tick()
    bench.finish("large")
    assert not bench.issue("large", 9960)
    bench.finish("other")
    bench.end("other")
    bench.now += thunderagent.FORCED_AFTER_S
    assert bench.tick() == ["large"]
    assert bench.submitted[-1].replica == 0


def test_thunderagent_guesses_tokens_from_characters_until_they_are_reported():
    bench = Bench(partial(ThunderAgent, from_chars=True), kv_tokens=10**9)
    tokens = []
    for name in ("a", "b"):
        assert bench.issue(name, 10_000)
        tokens.append(bench.policy._programs[name].tokens)
        bench.finish(name)
        assert bench.policy._programs[name].tokens == 10_010
    ratio = {
        name: random.Random(f"chars/{name}").lognormvariate(*thunderagent.CHARS_PER_TOKEN_LN)
        for name in ("a", "b")
    }
    assert tokens[0] == int(10_000 * ratio["a"] / thunderagent.FIRST_RATIO)
    assert tokens[1] == int(10_000 * ratio["b"] / ratio["a"])


def test_thunderagent_holds_every_thread_of_a_paused_program_and_lets_all_go():
    bench = Bench(ThunderAgent)
    bench.run("family", 2000)
    bench.run("other", 3000)
    assert bench.issue("other", 9000)
    bench.tick()
    assert not bench.issue("family", 2100)
    assert not bench.issue("family", 500, agent="child")
    bench.finish("other")
    bench.end("other")
    assert bench.tick() == ["family", "family"]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("options", [{}, {"origin_only": True}, {"from_chars": True}])
def test_thunderagent_holds_calls_and_finishes_everything(replicas, options):
    def once():
        return play(partial(ThunderAgent, **options), many(24), 12 * replicas, replicas=replicas)

    cluster = once()
    calls = [call for session in cluster.sessions for call in session.calls]
    assert any(call.submitted_s > call.issued_s for call in calls)
    assert not cluster.policy._programs
    assert times(once()) == times(cluster)


# -- Continuum ------------------------------------------------------------------------------------


def test_time_to_live_before_anything_was_seen_assumes_a_gap_of_a_second():
    assert TimeToLive().seconds("bash", 5.0) == pytest.approx(math.log(5))
    assert TimeToLive().seconds("bash", 0.9) == 0


def test_time_to_live_is_the_best_of_the_gaps_seen():
    rng = random.Random(3)
    model = TimeToLive()
    gaps = [rng.lognormvariate(0, 1.5) for _ in range(200)]
    for gap in gaps:
        model.saw_gap("bash", gap)
    for reload_s in (0.1, 2.0, 20.0):
        best = max([0.0, *gaps], key=lambda t: sum(g <= t for g in gaps) / len(gaps) * reload_s - t)
        assert model.seconds("bash", reload_s) == best


def test_time_to_live_uses_a_tools_own_gaps_once_there_are_enough():
    model = TimeToLive()
    for _ in range(101):
        model.saw_gap("quick", 0.5)
    for _ in range(100):
        model.saw_gap("slow", 30.0)
    assert model.seconds("slow", 10.0) == 0.5  # of any tool: half of them are quick
    model.saw_gap("slow", 30.0)
    assert model.seconds("slow", 10.0) == 0.0  # never worth it
    assert model.seconds("slow", 40.0) == 30.0
    assert model.seconds("never seen", 10.0) == 0.5


def test_time_to_live_counts_the_wait_that_a_pin_saves_by_eta():
    model = TimeToLive()
    for _ in range(101):
        model.saw_gap("bash", 3.0)
    assert model.seconds("bash", 1.0) == 0.0
    model.saw_wait(4.0)
    assert model.seconds("bash", 1.0) == 3.0
    lengths = [1, 2, 40, 3, 7]
    for calls in lengths:
        model.saw_end(calls)
    pairs = np.array([(k, n - k) for n in lengths for k in range(1, n)])
    assert model.eta == pytest.approx(-np.corrcoef(pairs.T)[0, 1])


class Watched(Continuum):
    """Notes which contexts were pinned when their calls had ended."""

    def __init__(self, cluster):
        super().__init__(cluster)
        self.pinned: list[LiveCall] = []

    def on_finish(self, call):
        super().on_finish(call)
        if call.thread in self._pins[call.replica]:
            self.pinned.append(call)


def completion(cluster):
    return sum(session.finished_s - session.arrival_s for session in cluster.sessions)


class Unpinned(Continuum):
    def ttl_s(self, call):
        return 0.0


@pytest.mark.parametrize("overlapping", [False, True])
def test_continuum_pins_between_calls_and_leaves_nothing_pinned(overlapping):
    def once():
        return play(Watched, many(24), lanes=12, machine=SLOW, overlapping=overlapping)

    cluster = once()
    assert cluster.policy.pinned
    assert not any(call.index == len(call.session.calls) - 1 for call in cluster.policy.pinned)
    pool = cluster.replicas[0].scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert times(once()) == times(cluster)


def test_continuum_keeps_new_calls_out_while_pins_fill_the_pool():
    sessions = [agent(n, gap=0.2) for n in range(30)]
    pinned, unpinned = (play(make, sessions, 20, SLOW) for make in (Continuum, Unpinned))
    assert completion(pinned) < 0.8 * completion(unpinned)


def test_continuum_gives_up_pins_rather_than_stand_still():
    class Forever(Continuum):
        def ttl_s(self, call):
            return math.inf

    play(Forever, [agent(n, calls=4, gap=50.0) for n in range(20)], lanes=20)


def test_a_call_that_cannot_use_what_is_pinned_for_it_gets_room_all_the_same():
    first = Call(prompt_tokens=5000, new_tokens=5000, output_tokens=10, gap="tool", tool="edit")
    edited = Call(prompt_tokens=4900, new_tokens=4900, output_tokens=10, gap="end")

    class Forever(Continuum):
        def ttl_s(self, call):
            return math.inf

    play(Forever, [Session("edits", (first, edited))], lanes=1)


@pytest.mark.parametrize("make", [Continuum, Plas, ThunderAgent])
def test_calls_of_a_session_may_go_to_several_engines(make):
    cluster = play(make, many(24), 20, SLOW, replicas=2, placement=round_robin)
    for replica in cluster.replicas:
        pool = replica.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_continuum_orders_by_program_and_pinned_calls_before_others():
    bench = Bench(Continuum)
    bench.policy._pins.append(pins := {})
    for name in ("old", "young"):
        bench.issue(name, 100)
    rank = {
        name: bench.policy.priority(bench.sessions[name].threads[None].call)
        for name in ("old", "young")
    }
    assert rank["old"] < rank["young"]
    thread = bench.sessions["young"].threads[None]
    pins[thread] = True
    assert bench.policy.priority(thread.call) < rank["old"]
