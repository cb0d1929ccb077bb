"""What keeping a workflow's KV is worth, in seconds of the engine."""

from __future__ import annotations

import math

from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.stepfit import Step
from vllm_saga.policy.workflow import Workflow


class Price:
    """What it costs to keep a workflow's KV, and what it costs not to, in seconds of progress.

    Keeping it for a second takes a second of progress from as many of those who wait as would fit
    in its place, as far as the engine has time to spare for them. Computing again what its next
    call will use takes that long from the workflow itself, and from the calls that run meanwhile,
    whose steps a prefill stretches. `patience` weighs the first against the second: at 0.5 both
    count the same, at 0 the first counts four times, at 1 nothing: a place is kept for as long as
    it takes.

    Args:
        capacity_tokens: tokens of KV in the pool.
        overdraft: cycles of progress that computing twice may cost in a cycle of who need not wait.
    """

    def __init__(
        self, cost: CostModel, patience: float, capacity_tokens: int, overdraft: float = 0.0
    ) -> None:
        self._cost = cost
        self._overdraft = overdraft
        self._weight = 2.0 * (1.0 - patience) / (0.5 + patience)
        self._capacity_tokens = capacity_tokens

    @property
    def known(self) -> bool:
        """Whether enough steps were timed to speak of costs."""
        return self._cost.known

    def prefill_s(self, tokens: int) -> float:
        """Engine seconds to compute a context of `tokens` tokens."""
        return self._cost.prefill_s(tokens)

    def again_s(self, workflow: Workflow) -> float:
        """Engine seconds to compute the contexts again that the workflow has not left."""
        return sum(self.prefill_s(max(context.tokens, 1)) for context in workflow.wanted())

    def break_even_s(self, workflow: Workflow, residents: int) -> float:
        """Seconds of keeping the workflow's KV that cost what computing it again does.

        residents: workflows that have a place; those who wait are taken to be of their size.
        Nothing is given up before steps have been timed.
        """
        if not self._cost.known:
            return math.inf
        in_its_place = _tokens(workflow) / self._capacity_tokens * max(residents, 1)
        saved_s = self.again_s(workflow) * workflow.agent.reuse
        again = saved_s * (1.0 + self._cost.running)
        return again / max(self._weight * self._cost.spare * in_its_place, 1e-9)

    def overdraft_tokens(self, workflow: Workflow, held: int) -> int:
        """Tokens by which the pool may be short with the workflow in it.

        Of a pool that is short, the tail of the youngest resident is evicted, and computed again
        with its next call: once in a cycle (a call and a gap), which takes that long from itself
        and from the calls that run meanwhile. To hold the workflow takes all of its progress. So a
        little too much is better than a hold, as far as the engine has time to spare, and the
        less, by the square, the more workflows are held: a pool that is short for long is not made
        larger by computing things twice.

        Args:
            held: workflows that are held.
        """
        if not self._cost.known:
            return 0
        token_s = self._cost.work_s(Step(1, _tokens(workflow), 0))
        again_s = token_s * (1.0 + self._cost.running)
        worth_s = self._overdraft * self._cost.spare * workflow.agent.cycle_s / (1 + held) ** 2
        return int(min(worth_s / max(again_s, 1e-9), self._capacity_tokens))


def _tokens(workflow: Workflow) -> int:
    """Tokens of the contexts that the workflow has not left."""
    return sum(max(context.tokens, 1) for context in workflow.wanted())
