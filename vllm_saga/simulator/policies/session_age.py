"""vLLM's own priority scheduling, with the age of the session as priority."""

from __future__ import annotations

from vllm_saga.simulator.policies.base import Policy
from vllm_saga.simulator.records import LiveCall


class SessionAge(Policy):
    """`--scheduling-policy priority`; a call's priority is its session's place in arrival order.

    What an operator can have today from a gateway that stamps `X-Vllm-Priority`. vLLM also picks
    the victims of preemption by it: the youngest session first.
    """

    ordering = "priority"

    def priority(self, call: LiveCall) -> int:
        return call.session.number
