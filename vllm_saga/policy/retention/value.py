"""Retention by value density: what keeping a block saves, for the time that it takes up room."""

from __future__ import annotations

from vllm_saga.policy.price import Price
from vllm_saga.policy.retention.base import Retention
from vllm_saga.policy.workflow import Context

_LEAST_IDLE_S = 0.1


class ValueDensity(Retention):
    """worth = re-prefill seconds of a token x the rate at which the workflow is expected back.

    The rate is P(return) over the expected time to the return, both given how long it has been
    away (`GapModel.return_rate`). As far as the class's gaps have not fallen where they had been
    predicted (`AgentClass.confidence`), 1 over the time away stands in for it, which is LRU: a
    predictor that is wrong must not be worse than none.
    """

    def __init__(self, price: Price) -> None:
        self._price = price

    def worth(self, context: Context, now: float) -> float:
        workflow = context.session.workflow
        away_s = max(now - context.idle_since, _LEAST_IDLE_S)
        trust = workflow.agent.confidence(workflow.tool)
        expected = workflow.agent.gaps_after(workflow.tool).return_rate(away_s)
        rate = trust * expected + (1.0 - trust) / away_s
        tokens = max(context.tokens, 1)
        return rate * self._price.prefill_s(tokens) / tokens
