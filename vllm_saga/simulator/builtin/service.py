"""Customer service: a large prompt that all sessions of one desk share, and tiny turns.

Figures, unless said otherwise, are quantiles of the trajectories that sierra-research/tau2-bench
(branch feature/gym) published for its airline and retail tasks, 170 sessions.

turns
    p50 11, p90 17, at most 31
shared prefix
    3,300 tokens, one per desk: sharing it raises reuse from .899 to .958. Two desks.
first prompt
    the shared prefix and the customer's first message (30-150 tokens; assumption)
new tokens
    p50 60, p90 528, p99 1,701
output
    p50 52, p90 155, p99 303
gaps
    The source simulates tools and customers. A turn goes to a tool or to the customer with equal
    chance (assumption). Tools are look-ups: the latencies of Claude Code's Read on SWE-rebench
    (AgentCgroup, arXiv 2602.09345; Claude sessions). Customers answer like the humans of TraceLab
    (`trace.HUMAN_GAP_LN`).
"""

from __future__ import annotations

import random

from vllm_saga.simulator.builtin.draw import LogNormal, stream
from vllm_saga.simulator.trace import (
    HUMAN_GAP_CAP_S,
    HUMAN_GAP_LN,
    Call,
    Session,
    SharedPrefix,
    quantile,
)

TURNS = LogNormal(11, 17)
MAX_TURNS = 31
SHARED_PREFIX_TOKENS = 3_300
DESKS = ("desk-a", "desk-b")
FIRST_MESSAGE_TOKENS = (30, 150)
NEW_QUANTILES = ((0.0, 8.0), (0.5, 60.0), (0.9, 528.0), (0.99, 1_701.0), (1.0, 3_000.0))
OUTPUT_QUANTILES = ((0.0, 8.0), (0.5, 52.0), (0.9, 155.0), (0.99, 303.0), (1.0, 600.0))
TOOL_SHARE = 0.5
LOOKUP_QUANTILES = (
    (0.0, 0.01),
    (0.25, 0.03),
    (0.5, 0.04),
    (0.75, 0.05),
    (0.9, 0.11),
    (0.95, 0.18),
    (0.99, 0.31),
    (1.0, 1.0),
)


def sessions(count: int, seed: int = 0) -> list[Session]:
    """`count` sessions; session k is the same whatever `count` is."""
    return [_session(seed, index) for index in range(count)]


def _session(seed: int, index: int) -> Session:
    """Draw one session."""
    rng = stream("service", seed, index)
    desk = rng.choice(DESKS)
    return Session(
        session_id=f"service-{seed}-{index}",
        calls=calls(rng, TURNS.whole(rng, 2, MAX_TURNS)),
        source="builtin",
        tenant=desk,
        shared_prefix=SharedPrefix(group=desk, tokens=SHARED_PREFIX_TOKENS),
    )


def calls(rng: random.Random, turns: int) -> tuple[Call, ...]:
    """A chain of `turns` calls, each a pure append."""
    chain: list[Call] = []
    context = 0
    for turn in range(turns):
        if turn == 0:
            new = SHARED_PREFIX_TOKENS + rng.randint(*FIRST_MESSAGE_TOKENS)
        else:
            new = round(quantile(rng.random(), NEW_QUANTILES))
        output = round(quantile(rng.random(), OUTPUT_QUANTILES))
        if turn == turns - 1:
            call = Call(context + new, new, output, gap="end")
        elif rng.random() < TOOL_SHARE:
            latency_s = quantile(rng.random(), LOOKUP_QUANTILES)
            call = Call(context + new, new, output, "lookup", latency_s, "tool")
        else:
            latency_s = min(HUMAN_GAP_CAP_S, rng.lognormvariate(*HUMAN_GAP_LN))
            call = Call(context + new, new, output, None, latency_s, "human")
        chain.append(call)
        context = call.context_tokens
    return tuple(chain)
