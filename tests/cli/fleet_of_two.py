"""An answer of /v1/saga/workflows as two busy engines and a dead one give it."""

from __future__ import annotations

from typing import Any

from vllm_saga.config import SagaConfig
from vllm_saga.policy import overview
from vllm_saga.policy.explain import Explainer
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.stepfit import Step
from vllm_saga.policy.workflow import Arrival

BLOCK = 16
POOL = 28_000


def busy_engine(name: str, agents: int, now: float = 60.0) -> overview.Overview:
    """Agents of two tenants, every third one in a gap, as far as they fit 28,000 blocks."""
    config = SagaConfig.model_validate({"tenant_source": "saga_tenant"})
    policy = SagaPolicy(config, POOL, BLOCK)
    for _ in range(64):
        policy.cost.observe(Step(1000, 500_000, 0, 8), 0.1, 0.1)
    running = set()
    for number in range(agents):
        tenant = ("search-team", "batch")[number % 2]
        blocks = 1500 + 731 * number % 2500
        call_id = f"{name}-{number}"
        chain = [hash((name, number, block)) for block in range(blocks)]
        session = f"swe-agent/django__django-{11000 + 37 * number}"
        arrival = Arrival(call_id, chain, blocks * BLOCK, session_id=session, tenant=tenant)
        policy.on_arrival(arrival, 2.5 * number)
        if policy.is_held(call_id):
            continue
        policy.on_scheduled(call_id, 0)
        if number % 3 == 0:
            policy.on_finish(call_id, blocks * BLOCK + 200, 2.5 * number + 2.0, ("bash",))
        elif number % 7:
            running.add(call_id)
    told = Explainer(policy, now, running).workflows(None, 100)
    calls = {"scheduler": "saga", "running": len(running), "waiting": 3}
    return overview.renamed(overview.of_engine("0", calls | told), name)


def fleet() -> dict[str, Any]:
    parts = [
        busy_engine("10.0.0.1:8000", 18),
        busy_engine("10.0.0.2:8000", 8),
        overview.silent("10.0.0.3:8000", "it does not answer"),
    ]
    return overview.together(parts, 100)
