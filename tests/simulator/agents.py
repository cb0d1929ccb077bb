"""Small synthetic agents and a small machine, so that whole simulations take a second."""

from __future__ import annotations

import random

from vllm_saga.simulator import hardware
from vllm_saga.simulator.trace import Call, Session, SharedPrefix

SMALL = hardware.Hardware(
    name="small",
    source="made up for tests: 10 ms a step, 0.1 ms a new token, 1 us a token of context read",
    kv_tokens=16_000,
    max_num_seqs=16,
    max_num_batched_tokens=512,
    cost=hardware.Linear(base_s=0.01, token_s=1e-4, kv_token_s=1e-6),
)


def agent(number, calls=8, first=600, new=100, output=30, gap=0.5, group=None):
    """A plain agent: every prompt extends the last answer."""
    described, context = [], 0
    for step in range(calls):
        fresh = first if step == 0 else new + 7 * (number % 5)
        described.append(
            Call(
                prompt_tokens=context + fresh,
                new_tokens=fresh,
                output_tokens=output,
                tool="bash",
                tool_latency_s=gap,
                gap="tool",
            )
        )
        context += fresh + output
    prefix = SharedPrefix(group, 320) if group else None
    return Session(f"agent-{number}", tuple(described), shared_prefix=prefix)


def many(count, **options):
    rng = random.Random(7)
    return [
        agent(number, calls=rng.randint(4, 14), gap=rng.uniform(0, 2), **options)
        for number in range(count)
    ]
