"""Offline reference: this project's scheduler, told each session's future instead of guessing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from vllm_saga.policy.graph import AgentClass
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.saga import Saga
from vllm_saga.simulator.records import LiveCall, LiveSession
from vllm_saga.simulator.trace import Call


class _Future(AgentClass):
    """Answers an agent class gives from what it has seen, given from the trace instead."""

    def __init__(self, session: LiveSession) -> None:
        super().__init__()
        self._future = session.trace.calls
        self._delays_s = session.trace.delays_s
        self._done = 0
        self.gaps = cast(Any, self)
        ends = [call.context_tokens for call in self._future]
        self._growth_after = [max(max(ends[k:]) - ends[k], 0) for k in range(len(ends))]

    @property
    def _next_call(self) -> Call | None:
        """The call in flight or to come; None after the last."""
        return self._future[self._done] if self._done < len(self._future) else None

    @property
    def growth_tokens(self) -> float:
        """Tokens the next call adds to what the last one left."""
        call = self._next_call
        return call.new_tokens + call.output_tokens if call else 0.0

    @property
    def output_tokens(self) -> float:
        """Tokens the call in flight generates."""
        return self._next_call.output_tokens if self._next_call else 0.0

    def observe_output(self, tokens: int) -> None:
        pass

    def remaining_growth_tokens(self, calls_done: int) -> float:
        return self._growth_after[min(calls_done, len(self._growth_after) - 1)]

    @property
    def sure(self) -> float:
        return 1.0

    def outlook(
        self, calls_done: int, left: float | None, tokens: float, ahead_s: Sequence[float]
    ) -> list[tuple[float, float]]:
        """What the trace says; nothing is left to chance."""
        calls = [self._done + int(seconds / self.cycle_s) for seconds in ahead_s]
        now = self._future[self._done - 1].context_tokens if self._done else 0.0
        base = max(now, tokens)
        return [
            (self._future[at].context_tokens - base if at < len(self._future) else -tokens, 0.0)
            for at in calls
        ]

    def remaining_calls(self, calls_done: int) -> float:
        return float(max(len(self._future) - self._done, 0))

    def give_way_s(self, break_even_s: float) -> float:
        """At once if the next gap is longer than holding is worth, else never."""
        if self._next_call is None:
            return 0.0
        return 0.0 if self._delays_s[self._done] > break_even_s else 1e9

    def patience_s(self, threshold: float) -> float:
        """For ever while there is another call, not at all after the last."""
        return 1e9 if self._next_call else 0.0

    def quantile_s(self, share: float) -> float:
        """The seconds to the next call, whatever the share; 0 after the last."""
        return self._delays_s[self._done] if self._next_call else 0.0

    def return_rate(self, idle_s: float) -> float:
        """1 over the seconds to the next call; 0 after the last."""
        if self._next_call is None:
            return 0.0
        return 1.0 / max(self._delays_s[self._done] - idle_s, 0.1)

    def gaps_after(self, tool: str | None) -> Any:
        return self

    def confidence(self, tool: str | None) -> float:
        return 1.0

    def observe_call(self, previous: str | None, tool: str | None, growth_tokens: int) -> None:
        # Told once for every call that ends, before anything is asked.
        self._done += 1

    def observe_return(self, gap_s: float) -> None:
        pass

    def retract_end_after(self, tool: str | None, calls: int) -> None:
        pass

    def observe_end_after(self, tool: str | None, calls: int) -> None:
        pass


class _Futures:
    """Takes the place of `AgentClasses`: the fingerprint of a call is its session id."""

    def __init__(self) -> None:
        self._futures: dict[str, _Future] = {}

    def know(self, session: LiveSession) -> None:
        if session.id not in self._futures:
            self._futures[session.id] = _Future(session)

    def get(self, session_id: str) -> _Future:
        return self._futures[session_id]

    def forget(self, session_id: str) -> None:
        self._futures.pop(session_id, None)

    def __len__(self) -> int:
        return len(self._futures)


class SagaOracle(Saga):
    """Knows the growth still to come, the end of every session, and that the others return."""

    def __init__(self, cluster: ClusterView) -> None:
        super().__init__(cluster)
        self._futures = _Futures()

    def attach(self, replica: int, scheduler: Any) -> None:
        super().attach(replica, scheduler)
        scheduler.saga.classes = self._futures
        scheduler.saga._fingerprint = lambda arrival: arrival.session_id

    def on_submit(self, call: LiveCall) -> None:
        super().on_submit(call)
        self._futures.know(call.session)

    def on_session_end(self, session: LiveSession) -> None:
        self._futures.forget(session.id)
