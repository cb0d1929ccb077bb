"""What tests of the rivals share: calls issued by hand, and small machines short of memory."""

from __future__ import annotations

import msgspec
from agents import SMALL

from vllm_saga.simulator import hardware
from vllm_saga.simulator.cluster import Cluster, Setup
from vllm_saga.simulator.placement import least_loaded
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread
from vllm_saga.simulator.trace import Call, Session

TIGHT = msgspec.structs.replace(SMALL, kv_tokens=8_000)
#: Prefill ten times as slow: keeping 1,000 tokens saves 1 s.
SLOW = msgspec.structs.replace(TIGHT, cost=hardware.Linear(base_s=0.01, token_s=1e-3))


class Bench:
    """A policy on a made-up cluster: calls are issued and finished by hand."""

    def __init__(self, make, replicas=1, kv_tokens=10_000):
        self.now = 0.0
        self.submitted: list[LiveCall] = []
        self.policy = make(
            ClusterView(
                replicas=replicas,
                kv_tokens=kv_tokens,
                hardware=SMALL,
                now=lambda: self.now,
                in_flight=lambda: [0] * replicas,
                kv_in_use=lambda replica: (0, 0),
                submit=self._submit,
                move=lambda call, replica: False,
            )
        )
        self.sessions: dict[str, LiveSession] = {}

    def _submit(self, call):
        call.replica = self.policy.replica_for(call) or 0
        call.submitted_s = self.now
        self.submitted.append(call)
        self.policy.on_submit(call)

    def issue(self, name, prompt, output=10, agent=None):
        """The next call of a session, or of a sub-agent of it; True if it got through."""
        if name not in self.sessions:
            described = Session(name, (Call(prompt_tokens=1, new_tokens=1, output_tokens=1),) * 99)
            number = len(self.sessions)
            self.sessions[name] = LiveSession(name, described, number, self.now)
        session = self.sessions[name]
        thread = session.threads.setdefault(agent, Thread(session, agent))
        call = _Described(f"{name}#{len(session.calls)}", thread, len(session.calls), self.now)
        call.described = Call(
            prompt_tokens=prompt, new_tokens=prompt, output_tokens=output, gap="tool"
        )
        session.calls.append(call)
        thread.call = call
        if self.policy.admit(call):
            self._submit(call)
        return call in self.submitted

    def finish(self, name, agent=None):
        thread = self.sessions[name].threads[agent]
        call, thread.call = thread.call, None
        call.finished_s, thread.last = self.now, call
        self.policy.on_finish(call)

    def end(self, name):
        self.policy.on_session_end(self.sessions[name])

    def tick(self):
        """Let 5 s pass; the names of the sessions whose calls got through, in order."""
        before = len(self.submitted)
        self.now += 5.0
        self.policy.on_tick()
        return [call.session.id for call in self.submitted[before:]]

    def run(self, name, prompt, output=10):
        """A session with one call behind it: acting."""
        assert self.issue(name, prompt, output)
        self.finish(name)


class _Described(LiveCall):
    """A call whose description is not in a trace."""

    described: Call

    @property
    def spec(self):
        return self.described


def play(make, sessions, lanes=8, machine=TIGHT, placement=least_loaded, **options):
    """A finished run."""
    cluster = Cluster(Setup(sessions, machine, placement, lanes=lanes, **options), make)
    cluster.run()
    assert all(session.finished_s is not None for session in cluster.sessions)
    return cluster


def times(cluster):
    """When every call ended: two runs with the same times did the same."""
    return [call.finished_s for session in cluster.sessions for call in session.calls]
