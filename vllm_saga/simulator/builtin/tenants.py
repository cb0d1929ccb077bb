"""SAGA's multi-tenant mix (arXiv 2605.00528): ten tenants in three classes.

    class   tenants  steps  sessions per minute and tenant
    heavy         3    100                              16
    medium        4     30                               8
    light         3     10                               4

SAGA says no more about these sessions. Ours: heavy tenants run Claude Code on its own
(`claude_code.AUTONOMOUS`), medium ones `swe`, light ones `web` and `service`, so that the classes
differ in shape as well as in length. Every tenant is one agent product with its own shared prefix.

`arrival_s` is the merged arrival process (Poisson per tenant, 92 sessions per minute in all); an
open load may rescale it to what the cluster under test can carry.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from vllm_saga.simulator.builtin import claude_code, service, swe, web
from vllm_saga.simulator.builtin.draw import stream
from vllm_saga.simulator.trace import Call, Session, SharedPrefix


def _autonomous(rng: random.Random, steps: int) -> tuple[Call, ...]:
    return claude_code.calls(rng, steps, claude_code.AUTONOMOUS)


class Tenant(NamedTuple):
    """One tenant: what it runs, for how many steps, and how often."""

    name: str
    steps: int
    sessions_per_min: float
    prefix_tokens: int
    calls: Callable[[random.Random, int], tuple[Call, ...]]


TENANTS = (
    *(
        Tenant(f"heavy-{k}", 100, 16, claude_code.SHARED_PREFIX_TOKENS, _autonomous)
        for k in (1, 2, 3)
    ),
    *(Tenant(f"medium-{k}", 30, 8, swe.SHARED_PREFIX_TOKENS, swe.calls) for k in (1, 2, 3, 4)),
    Tenant("light-1", 10, 4, web.SHARED_PREFIX_TOKENS, web.calls),
    Tenant("light-2", 10, 4, service.SHARED_PREFIX_TOKENS, service.calls),
    Tenant("light-3", 10, 4, web.SHARED_PREFIX_TOKENS, web.calls),
)
SESSIONS_PER_MIN = sum(tenant.sessions_per_min for tenant in TENANTS)


def sessions(count: int, seed: int = 0) -> list[Session]:
    """`count` sessions in order of arrival; session k is the same whatever `count` is."""
    out = []
    now_s = 0.0
    for index in range(count):
        rng = stream("tenants", seed, index)
        now_s += rng.expovariate(SESSIONS_PER_MIN / 60)
        # A Poisson process whose events are dealt out at random is one Poisson process per tenant.
        [tenant] = rng.choices(TENANTS, [t.sessions_per_min for t in TENANTS])
        out.append(
            Session(
                session_id=f"tenants-{seed}-{index}",
                calls=tenant.calls(rng, tenant.steps),
                source="builtin",
                tenant=tenant.name,
                arrival_s=now_s,
                shared_prefix=SharedPrefix(tenant.name, tenant.prefix_tokens),
            )
        )
    return out
