"""PLAS keeps to its own rules, and does something in a whole run."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
from agents import agent
from rival_bench import TIGHT, Bench, times

from vllm_saga.simulator.cluster import Cluster, Setup
from vllm_saga.simulator.placement import least_loaded
from vllm_saga.simulator.policies.plas import Plas


class Engine(Bench):
    """With a stand-in for one engine's scheduler."""

    def __init__(self, **options):
        super().__init__(partial(Plas, **options))
        self.queue: list[str] = []
        self.requests: dict[str, SimpleNamespace] = {}
        waiting = SimpleNamespace(
            remove_request=lambda request: self.queue.remove(request.id),
            add_request=lambda request: self.queue.append(request.id),
        )
        self.scheduler = SimpleNamespace(requests=self.requests, waiting=waiting)

    def level(self, name):
        """Issue a call and say which level it enters."""
        self.issue(name, 100)
        call = self.submitted[-1]
        level = self.policy.priority(call)
        self.requests[call.id] = SimpleNamespace(id=call.id, priority=level)
        self.queue.append(call.id)
        return level

    def serve(self, name, seconds, agent=None):
        call = self.sessions[name].threads[agent].call
        self.queue.remove(call.id)
        self.policy.note_running(call.id)
        self.later(seconds)
        self.finish(name, agent)

    def later(self, seconds):
        self.now += seconds
        self.policy.before_step(0, self.scheduler)


def test_plas_levels_follow_the_seconds_that_the_program_was_served():
    engine = Engine(quantum_s=1.0, levels=4)
    for seconds, level in ((0.9, 0), (0.2, 0), (1.8, 1), (100.0, 1), (1.0, 3), (1.0, 3)):
        assert engine.level("a") == level
        engine.serve("a", seconds)
    assert engine.level("b") == 0


def test_plas_takes_the_longest_path_of_parallel_calls():
    engine = Engine(quantum_s=1.0)
    engine.level("a")
    engine.issue("a", 100, agent="child")
    child = engine.submitted[-1]
    engine.requests[child.id] = SimpleNamespace(id=child.id, priority=0)
    engine.policy.note_running(child.id)
    engine.serve("a", 5.0)
    engine.later(1.0)
    engine.finish("a", "child")
    assert engine.policy._programs["a"].served_s == 6.0


def test_plas_sinks_a_call_that_runs_on():
    engine = Engine(quantum_s=1.0, levels=3)
    engine.level("a")
    call = engine.submitted[-1]
    engine.policy.note_running(call.id)
    levels = []
    for _ in range(8):
        engine.later(0.5)
        levels.append(engine.requests[call.id].priority)
    assert levels == [0, 1, 1, 1, 1, 2, 2, 2]
    # A call that waits again keeps its level.
    engine.policy.note_preempted(call.id)
    engine.queue.append(call.id)
    engine.later(1.0)
    assert engine.requests[call.id].priority == 2


def test_plas_raises_a_call_whose_program_has_waited_too_long():
    engine = Engine(quantum_s=1.0, beta=4.0)
    engine.level("a")
    engine.later(2.0)
    engine.serve("a", 3.0)
    assert engine.level("a") == 2
    call = engine.submitted[-1]
    engine.later(9.9)
    assert engine.requests[call.id].priority == 2
    engine.later(0.2)
    assert engine.requests[call.id].priority == 0
    assert engine.queue == [call.id]


@pytest.mark.parametrize("overlapping", [False, True])
def test_plas_serves_newcomers_first_and_finishes_everything(overlapping):
    def once(make):
        # Long programs fill the pool; a short one comes late.
        sessions = [*(agent(n, calls=25, new=200, gap=0.0) for n in range(12)), agent(99, calls=2)]
        arrivals = [0.0] * 12 + [20.0]
        setup = Setup(sessions, TIGHT, least_loaded, arrivals_s=arrivals, overlapping=overlapping)
        cluster = Cluster(setup, make)
        cluster.run()
        return cluster

    def waits(cluster):
        return sum(call.wait_s for call in cluster.sessions[-1].calls)

    plas = once(partial(Plas, quantum_s=0.5))
    assert all(session.finished_s is not None for session in plas.sessions)
    assert not plas.policy._active
    assert waits(plas) < 0.5 * waits(once(partial(Plas, quantum_s=1e9)))
    assert times(once(partial(Plas, quantum_s=0.5))) == times(plas)
