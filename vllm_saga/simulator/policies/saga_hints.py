"""This project's scheduler with clients that declare what comes next: rightly, or wrongly."""

from __future__ import annotations

import json
import random
from typing import Any

from vllm_saga.engine.hints import LAST
from vllm_saga.simulator.policies.base import ClusterView
from vllm_saga.simulator.policies.saga import Saga
from vllm_saga.simulator.records import LiveCall

_GAP_FACTOR = 10.0


class SagaHinted(Saga):
    """Every call declares the gap after it, the calls left and, at the end, that it is the last."""

    def extra_args(self, call: LiveCall) -> dict[str, Any] | None:
        trace = call.session.trace
        left = len(trace.calls) - 1 - call.index
        hint = {"expected_gap_s": self._gap_s(call), "steps_left": self._left(left)}
        if not left:
            hint |= self._last()
        return {"agent_hint": json.dumps(hint)}

    def _gap_s(self, call: LiveCall) -> float:
        delays_s = call.session.trace.delays_s
        return delays_s[call.index + 1] if call.index + 1 < len(delays_s) else 0.0

    def _left(self, left: int) -> int:
        return left

    def _last(self) -> dict[str, Any]:
        return {"last": True}


class SagaMisled(SagaHinted):
    """Gaps ten times too long, calls left drawn at random, no ends, and tools' names shuffled."""

    def __init__(self, cluster: ClusterView) -> None:
        super().__init__(cluster)
        self._rng = random.Random(0)
        self._seen: list[str] = []

    def _gap_s(self, call: LiveCall) -> float:
        return _GAP_FACTOR * super()._gap_s(call)

    def _left(self, left: int) -> int:
        return self._rng.randrange(100)

    def _last(self) -> dict[str, Any]:
        return {}

    def _tools_of(self, request: Any) -> list[str] | None:
        self._seen += super()._tools_of(request) or []
        return [self._rng.choice(self._seen)] if self._seen else None


class SagaEnds(Saga):
    """The last call of a session says so, and nothing else: what every rival is told, too."""

    def extra_args(self, call: LiveCall) -> dict[str, Any] | None:
        return {LAST: 1} if call.index + 1 == len(call.session.trace.calls) else None


class SagaToolless(Saga):
    """Outputs tell the engine nothing: no tool is ever known."""

    def _tools_of(self, request: Any) -> list[str] | None:
        return None
