"""Browser agents: each step replaces the page in the context, so only about half is reusable.

Figures, unless said otherwise, are quantiles of the runs that nottelabs/open-operator-evals (commit
50f8e47) published for three browser agents on WebVoyager: eight of its fifteen sites, 337 sessions.

steps
    p50 8, p90 20, at most 20
prompt
    system prompt and task, then the history, then the page. Published: p50 5.0K, p90 8.0K.
    The task (50-250 tokens) and what a step leaves in the history besides its output (0-60
    tokens) are assumptions that give these.
shared prefix
    1,700 tokens, one per agent product; with three products reuse rises from .505 to .531
new tokens
    page and last step: p50 2,262, p90 4,302. The page alone is put 200 tokens lower.
output
    p50 146, p90 328
gaps
    p50 3.4, p90 12.5, p99 41 s; < 1 s 3 %, < 10 s 84 %, < 60 s 99.6 %, at most 133 s. The source
    recorded the time of whole steps; the model's part was estimated and taken off.
"""

from __future__ import annotations

import random

from vllm_saga.simulator.builtin.draw import LogNormal, stream
from vllm_saga.simulator.trace import Call, Session, SharedPrefix, quantile

STEPS = LogNormal(8, 20)
MAX_STEPS = 20
SHARED_PREFIX_TOKENS = 1_700
PRODUCTS = ("browser-a", "browser-b", "browser-c")
TASK_TOKENS = (50, 250)
PAGE = LogNormal(2_060, 4_090)
MAX_PAGE_TOKENS = 10_000
STEP_NOTE_TOKENS = (0, 60)
OUTPUT = LogNormal(146, 328)
MAX_OUTPUT_TOKENS = 1_000
GAP_QUANTILES = (
    (0.0, 0.2),
    (0.03, 1.0),
    (0.5, 3.4),
    (0.841, 10.0),
    (0.9, 12.5),
    (0.99, 41.0),
    (0.996, 60.0),
    (1.0, 133.0),
)


def sessions(count: int, seed: int = 0) -> list[Session]:
    """`count` sessions; session k is the same whatever `count` is."""
    return [_session(seed, index) for index in range(count)]


def _session(seed: int, index: int) -> Session:
    """Draw one session."""
    rng = stream("web", seed, index)
    return Session(
        session_id=f"web-{seed}-{index}",
        calls=calls(rng, STEPS.whole(rng, 2, MAX_STEPS)),
        source="builtin",
        shared_prefix=SharedPrefix(group=rng.choice(PRODUCTS), tokens=SHARED_PREFIX_TOKENS),
    )


def calls(rng: random.Random, steps: int) -> tuple[Call, ...]:
    """A chain of `steps` calls; every call but the first is a `branch` of the one before."""
    chain: list[Call] = []
    kept = 0
    added = SHARED_PREFIX_TOKENS + rng.randint(*TASK_TOKENS)
    for step in range(steps):
        new = added + PAGE.whole(rng, 100, MAX_PAGE_TOKENS)
        output = OUTPUT.whole(rng, 1, MAX_OUTPUT_TOKENS)
        last = step == steps - 1
        chain.append(
            Call(
                prompt_tokens=kept + new,
                new_tokens=new,
                output_tokens=output,
                tool=None if last else "browser",
                tool_latency_s=None if last else quantile(rng.random(), GAP_QUANTILES),
                gap="end" if last else "tool",
                kind="branch" if step else None,
            )
        )
        kept += added
        added = output + rng.randint(*STEP_NOTE_TOKENS)
    return tuple(chain)
