"""SAGA as published: the policy that joins its graph, cache, routing and fairness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_saga.policy.retention import DEAD, KeepRank
from vllm_saga.policy.retention.wa_lru import ALPHA, BETA, eviction_score
from vllm_saga.simulator import trace
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.ranked import RankedPolicy
from vllm_saga.simulator.policies.saga_paper.balance import Balancer, copy_prefix
from vllm_saga.simulator.policies.saga_paper.fairness import AgentFairShare, reorder
from vllm_saga.simulator.policies.saga_paper.formulas import ttl_s
from vllm_saga.simulator.policies.saga_paper.graph import Histories, Run, tool_of
from vllm_saga.simulator.policies.saga_paper.memory import Memory, Resident
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread

# Classes of RetentionQueue: above blocks of nobody (1, 0), below shared prefixes (5, 0).
_DROPPED, _UNPROTECTED, _PROTECTED = 1, 2, 3


class SagaPaper(RankedPolicy):
    """SAGA (arXiv 2605.00528) as published: graph, cache, time to live, engines, fairness.

    Source: the paper's equations, as an independent re-implementation of its second version cites
    them (https://github.com/HCAHOI/agent-sched-bench, `scripts/baselines/saga_reproduction.py`).
    Values with a star are not known from the paper itself, but from a repository that calls itself
    its artefact without proof; of that, values only.

    * Graph, learned online for each type of agent: which tool follows which, and how many tokens
      come with it. If one successor has at least 0.7* of a tool's cases, the graph is linear
      through it, with probability 1 - 0.05*, or ends there (Eq 4 gives 0). Otherwise the agent
      goes on with probability 1 - 1/max(2, mean steps left)*. Types seen in fewer than 30* ended
      runs get request-level service: LRU, no time to live, no urgency.
    * Eviction (Eqs 1 to 5): 0.3 age + 0.5 (1 - P_reuse) + 0.2 size, age and size over the largest
      on the engine, the largest first. Contexts within their time to live come last.
    * Time to live (Algorithm 1, Eq 6): the tool's empirical p95 latency x (1 - 0.5 m), at most
      300 s, m rising from 0 to 1 while 0.7 to 0.9 of the memory is used. Contexts that outlived
      it are dropped only while more than 0.7 is used; ended agents' are dropped at once.
    * Routing: a session stays on its engine while load < 0.8* and its KV is there; else it goes
      where load = 0.5 batch + 0.5 memory + 0.01 waiting calls* is least.
    * Stealing, every 100 ms: an engine whose queue has been empty for 100 ms*, or the least loaded
      one, takes the oldest pending session of a random one of those whose load (0.05 per waiting
      call*) is more than 2.0* times the least; its KV follows in 230 ms*.
    * Agent Fair Share (Eqs 8, 9): a tenant's urgency is the sum over its tasks of remaining work /
      (deadline - now), deadline = arrival + 1.5* expected completion; recomputed every 100 ms*, and
      waiting calls are ordered by it.

    What the paper leaves open is decided in its favour; where runs on traces of coding agents told
    a difference, it is given as how much longer tasks took otherwise:

    * Type of agent: its system prompt and tools, and the product until 30 runs of these are known;
      sub-agents apart. `history` are sessions seen before the run: until 30 have ended nothing is
      known (1.6 times). A thread of calls is what the cache rules mean by a session.
    * Termination counts as a successor. A tool with less than 20 latencies borrows all tools'.
    * Contexts within their time to live are given up "when allocation must progress": to a call
      that runs, or if none does. Other calls wait (vLLM's watermark; otherwise 1.4 times).
    * Memory used is what running calls and contexts not yet dropped take, at most what is there. A
      pool that counts whatever is still cached is always full: then m is 1, nothing is spared
      from dropping, and neither threshold means anything.
    * Dropped contexts are the first to die, and are hit if they return before that. A context whose
      next call waits in the engine ranks with those in their time to live.
    * Prefixes that several live contexts share die last (`RetentionQueue`): one of the owners is
      nearly always protected.
    * Batch and memory in `load` are running calls over `max_num_seqs`, and memory used.
    * Overloaded is by the load ratio alone. The code also takes any queue of two for an overload*;
      then half of all calls move (1.1 times). No time of stickiness is known; there is none.
    * Remaining work: mean of the steps left in longer runs so far, x mean seconds of a step alone
      on an engine. Overdue tasks keep the slack of one step (1.5 to 1.7 times if they drop out of
      the sum, as in the re-implementation, which rejects them). Within a tenant the task with the
      larger term goes first (as much with order of arrival): the paper reports what AFS gains for
      a single tenant, where the sums decide nothing.

    What is not there: prefetch of KV from host memory (no host tier is simulated); preemption of a
    call that has blocked another for 500 ms* (vLLM preempts when memory runs out, by rank); graphs
    declared by a framework; KV of contexts other than the waiting calls' when a session moves. A
    move takes 230 ms rounded up to a tick, always, and costs the engines no time.
    """

    ordering = "priority"
    tick_s = 0.1

    def __init__(self, cluster: ClusterView, history: Sequence[trace.Session] = ()) -> None:
        super().__init__(cluster)
        self._block_size = cluster.hardware.block_size
        self._histories = Histories(cluster.hardware)
        for session in history:
            self._histories.learn(session)
        self._fairness = AgentFairShare(self._histories)
        self._memory = Memory(cluster)
        self._balancer = Balancer(cluster, self._memory.used_fraction)
        self._schedulers: list[Any] = [None] * cluster.replicas
        self._in_flight: list[dict[str, LiveCall]] = [{} for _ in range(cluster.replicas)]
        self._longest_idle_s = 1.0
        self._largest_tokens = 1

    # -- cache: WA-LRU and time to live -----------------------------------------------------------

    def keep_rank(self, thread: Thread) -> KeepRank:
        resident = self._memory.get(thread)
        if thread.call is not None:
            reuse = resident.reuse if resident else None
            return (_PROTECTED, -self._score(0.0, reuse, thread.context_tokens))
        if resident is None:
            return DEAD
        if resident.dropped:
            return (_DROPPED, 1.0 + thread.idle_since)
        idle_s = self.cluster.now() - thread.idle_since
        score = self._score(idle_s, resident.reuse, resident.tokens)
        return (_PROTECTED if resident.protected else _UNPROTECTED, -score)

    def before_step(self, replica: int, scheduler: Any) -> None:
        super().before_step(replica, scheduler)
        self._memory.expire(replica)
        # vLLM's watermark: free blocks that a call cannot be admitted to while others run.
        protected = self._memory.protected_tokens[replica]
        scheduler.kv_cache_manager.watermark_blocks = protected // self._block_size

    def acts_at(self, replica: int, scheduler: Any) -> float:
        return self._memory.next_expiry_s

    def _keep_ranks(self, owners: Sequence[Any]) -> Sequence[KeepRank]:
        threads = [owner.thread for owner in owners if not owner.dead]
        now = self.cluster.now()
        idle = (now - thread.idle_since for thread in threads if thread.call is None)
        self._longest_idle_s = max(1.0, max(idle, default=0.0))
        self._largest_tokens = max(1, max((t.context_tokens for t in threads), default=0))
        return super()._keep_ranks(owners)

    def _score(self, idle_s: float, reuse: float | None, tokens: int) -> float:
        recency = min(idle_s / self._longest_idle_s, 1.0)
        if reuse is None:
            # No graph yet: request-level service, which is LRU.
            return ALPHA * recency + BETA
        return eviction_score(recency, reuse, min(tokens / self._largest_tokens, 1.0))

    def _retain(self, call: LiveCall, run: Run) -> None:
        """The agent has gone off to use a tool."""
        spec, shared = call.spec, call.session.trace.shared_prefix
        common = shared.tokens or 0 if shared and call.thread.agent is None else 0
        own = max(spec.context_tokens - common, 0)
        resident = Resident(call.thread, call.replica, spec.context_tokens, own)
        known = self._histories.knowledge(run)
        if known is not None:
            tool = tool_of(spec)
            resident.reuse = known.reuse(tool, run.steps, spec.context_tokens)
            used = self._memory.used_fraction(call.replica)
            resident.expires_s = self.cluster.now() + ttl_s(known.latencies(tool), used)
        self._memory.keep(resident)

    # -- engines: affinity, stealing, fair share --------------------------------------------------

    def attach(self, replica: int, scheduler: Any) -> None:
        super().attach(replica, scheduler)
        self._schedulers[replica] = scheduler
        self._balancer.attach(replica, scheduler)

    def replica_for(self, call: LiveCall) -> int | None:
        return self._balancer.route(call, self._is_cached) if self.cluster.replicas > 1 else 0

    def priority(self, call: LiveCall) -> int:
        return self._fairness.rank(call.session, self.cluster.now())

    def on_tick(self) -> None:
        if self.cluster.replicas > 1:
            for call, to in self._balancer.balance():
                self._move(call, to)
        if not any(scheduler.waiting for scheduler in self._schedulers):
            return
        now = self.cluster.now()
        self._fairness.update(now)
        for calls, scheduler in zip(self._in_flight, self._schedulers, strict=True):
            ranks = {c.id: self._fairness.rank(c.session, now) for c in calls.values()}
            reorder(scheduler, ranks)

    def _is_cached(self, session: LiveSession, replica: int) -> bool:
        residents = (self._memory.get(thread) for thread in session.threads.values())
        return any(r is not None and not r.dropped and r.replica == replica for r in residents)

    def _move(self, call: LiveCall, to: int) -> None:
        """The call's KV has arrived at another engine, and the call follows."""
        source = call.replica
        if self.cluster.move(call, to):
            owner = self._cached[to][call.thread]
            copy_prefix(call.id, self._schedulers[source], self._schedulers[to], owner)

    # -- what happens ---------------------------------------------------------------------------

    def on_submit(self, call: LiveCall) -> None:
        self._leave_others(call)
        self._memory.returned(call.thread, call.replica)
        super().on_submit(call)
        self._in_flight[call.replica][call.id] = call
        self._balancer.submitted(call)
        runs, agent = self._fairness.runs(call.session), call.thread.agent
        if agent not in runs:
            runs[agent] = self._histories.begin(call.session.trace, agent)
            self._fairness.progressed(call.session)

    def on_finish(self, call: LiveCall) -> None:
        super().on_finish(call)
        del self._in_flight[call.replica][call.id]
        self._balancer.finished(call)
        runs, agent = self._fairness.runs(call.session), call.thread.agent
        run = runs[agent]
        self._histories.end_step(run, call.spec, call.issued_s, self.cluster.now())
        if call.thread.ended:
            self._histories.end(runs.pop(agent))
            self._memory.release(call.thread)
        else:
            self._retain(call, run)
        self._fairness.progressed(call.session)

    def on_session_end(self, session: LiveSession) -> None:
        super().on_session_end(session)
        self._fairness.end(session)
        self._balancer.forget(session)
        for thread in session.threads.values():
            self._memory.release(thread)

    def _leave_others(self, call: LiveCall) -> None:
        """The thread is on this engine from now on; what it left on others is worthless."""
        thread = call.thread
        for replica, cached in enumerate(self._cached):
            if replica == call.replica:
                continue
            self._in_flight[replica].pop(call.id, None)
            self._owners[replica].pop(call.id, None)
            owner = cached.pop(thread, None)
            if owner is not None:
                owner.dead = True
