"""What keeping a workflow's KV is worth, in seconds of the engine."""

from __future__ import annotations

import math

from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.workflow import Workflow

_MOST_PATIENT = 1.0 - 1e-9


class Price:
    """The rate at which KV that is kept for one workflow is lost to those who wait for it.

    A pool of blocks is worth `cost.spare` engine seconds a second to those who wait, a part of it
    that part. `patience` weighs that against the workflow's own loss: at 0.5 both count the same;
    at 0 a place is kept for nobody, at 1 for as long as it takes.

    Args:
        capacity_tokens: tokens of KV in the pool.
    """

    def __init__(self, cost: CostModel, patience: float, capacity_tokens: int) -> None:
        self._cost = cost
        self._weight = 1.0 / max(patience, 1e-9) - 1.0 if patience < _MOST_PATIENT else 0.0
        self._capacity_tokens = capacity_tokens

    def prefill_s(self, tokens: int) -> float:
        """Engine seconds to compute a context of `tokens` tokens."""
        return self._cost.prefill_s(tokens)

    def again_s(self, workflow: Workflow) -> float:
        """Engine seconds to compute the workflow's contexts again."""
        return sum(self.prefill_s(max(context.tokens, 1)) for context in workflow.contexts())

    def break_even_s(self, workflow: Workflow) -> float:
        """Seconds of keeping the workflow's KV that cost what computing it again does.

        Nothing is given up before steps have been timed.
        """
        if not self._cost.known:
            return math.inf
        tokens = sum(max(context.tokens, 1) for context in workflow.contexts())
        rate = self._weight * self._cost.spare * tokens / self._capacity_tokens
        return self.again_s(workflow) / max(rate, 1e-9)
