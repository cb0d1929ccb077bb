"""What tenants are charged: seconds of the GPU, and of the KV pool."""

from __future__ import annotations

from vllm_saga.policy.cost import CostModel
from vllm_saga.policy.fairness import FairShare
from vllm_saga.policy.stepfit import Step
from vllm_saga.policy.workflow import Call, Workflow


class Meter:
    """Charges a workflow's tenant for the calls it runs and for the KV it keeps.

    Args:
        capacity: blocks of the KV pool.
    """

    def __init__(self, share: FairShare, cost: CostModel, capacity: int) -> None:
        self._share = share
        self._cost = cost
        self._capacity = capacity

    def hold(self, workflow: Workflow, now: float) -> None:
        """Charge what a resident has held since the last time, and begin anew."""
        if workflow.resident:
            pool_s = workflow.counted_blocks / self._capacity * (now - workflow.charged_at)
            self._share.charge(workflow.tenant, 0.0, pool_s, now)
        workflow.charged_at = now

    def run(self, call: Call, total_tokens: int, now: float) -> None:
        """Charge a call that has run: the part of its prompt that was not cached, its output."""
        prompt, cached = call.prompt_tokens, min(call.cached_tokens, call.prompt_tokens)
        output = max(total_tokens - prompt, 0)
        pairs = (prompt * prompt - cached * cached) // 2
        read = output * (prompt + output // 2)
        step = Step(prompt - cached + output, pairs + read, prompt + read)
        tenant = call.context.session.workflow.tenant
        self._share.charge(tenant, self._cost.work_s(step), 0.0, now)
