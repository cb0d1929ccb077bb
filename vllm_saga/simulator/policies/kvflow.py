"""KVFlow: evict first what the workflow's graph says will run last."""

from __future__ import annotations

from vllm_saga.policy.retention import KeepRank
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.lookahead import Lookahead
from vllm_saga.simulator.policies.ranked import RankedPolicy
from vllm_saga.simulator.records import LiveCall, LiveSession, Thread

#: `evict_pri_level` of the original: contexts that run within so many steps are told apart.
HOLD_STEP = 4
# More seconds than any run lasts: a step further outweighs any difference in age.
_STEP = 1e9


class KVFlow(RankedPolicy):
    """Contexts die in the order of their steps to execution, the farthest first.

    Source: arXiv 2507.07400 (NeurIPS 2025) and its code, https://github.com/PanZaifeng/KVFlow
    (`agent_manager.py`; `evict` in `hiradix_cache.py`; commit 0db29c6). The rules:

    * The client declares the workflow's graph. An agent's number is how many steps the workflow
      makes until it runs again, at most `HOLD_STEP` + 1; agents that the graph no longer names
      have `HOLD_STEP` + 1. Declared here: order and dependencies of a session's calls as in the
      trace (`deps`), no times and no sizes.
    * A context in use, running or waiting in the engine, has 0; one whose next call needs only the
      end of its gap, or of a call that runs now, has 1; a parent has 1 more than the longest chain
      of sub-agents' calls that must start before it; an agent that has ended, `HOLD_STEP` + 1.
    * Eviction goes in passes, from far to near, and last over everything; among equals, LRU.

    **In our workloads that is close to LRU, and faithfully so.** A session is a chain: whoever is
    not running is one step from running, so all contexts between two calls have the number 1 and
    the oldest goes first. KVFlow tells agents of one workflow apart, not workflows that compete,
    and a tool's latency is no part of its graph. It differs from LRU in sparing contexts whose
    call already waits, and in giving up sub-agents that are done and parents that wait for long.

    What differs from the original:

    * No prefetch from host memory, its second half: no host tier is simulated.
    * The original protects an agent's fixed prompt and evicts the varying rest of its context
      first. Here a context's next call extends all of it, so that all of it is fixed; where a call
      edits its context, the tail still goes before the head (`RetentionQueue`).
    * Within one pass the paper evicts the farthest first, the code whatever leaf comes first. Here
      as in the paper; contexts whose calls wait go in reverse order of issue, the next to run last.
    * A shared block has the minimum over its agents. `RetentionQueue` ranks what several live
      contexts share above everything else, which is that minimum wherever one of them is in use.
    """

    def __init__(self, cluster: ClusterView, hold_step: int = HOLD_STEP) -> None:
        super().__init__(cluster)
        self._farthest = hold_step + 1
        self._steps = Lookahead(self._steps_to_execution)

    def keep_rank(self, thread: Thread) -> KeepRank:
        call = thread.call
        if call is not None:
            return (3, -call.issued_s)
        return (3, thread.idle_since - self._steps.of(thread) * _STEP)

    def on_submit(self, call: LiveCall) -> None:
        super().on_submit(call)
        self._steps.changed(call.session)

    def on_finish(self, call: LiveCall) -> None:
        super().on_finish(call)
        self._steps.changed(call.session)

    def on_session_end(self, session: LiveSession) -> None:
        super().on_session_end(session)
        self._steps.forget(session)

    def _steps_to_execution(self, thread: Thread, first_open: int) -> float:
        """Of a thread that is between two calls: 1 to `hold_step` + 1."""
        session, last = thread.session, thread.last
        calls, deps = session.trace.calls, session.trace.deps
        if thread.ended or last is None:
            return self._farthest
        steps: dict[int, int] = {}
        for index in range(first_open, len(calls)):
            if session.calls[index] is not None:
                continue
            steps[index] = 1 + max((steps.get(dep, 0) for dep in deps[index]), default=0)
            if index > last.index and calls[index].agent == thread.agent:
                return min(steps[index], self._farthest)
        return self._farthest
