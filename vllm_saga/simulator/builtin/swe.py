"""Coding agents on SWE-bench tasks, as SAGA (arXiv 2605.00528) describes them.

calls per session
    mean 37 (SAGA, SWE-bench Verified). Gamma with coefficient of variation 0.5; the spread is our
    assumption, none is published.
first prompt
    2,000-4,000 tokens, uniform (SAGA). The first 1,500 (system prompt and tool schemas; our
    assumption) are the same for all sessions of one agent; there are 3 agents.
output
    100-500 tokens per call, uniform (SAGA)
new tokens per call
    log-normal, mean 480, sigma 1, at most 8,000. The mean makes an average session end at SAGA's
    32K context: 3,000 + 37 x (480 + 300).
gaps
    published quantiles of TraceLab: < 1 s 61 %, 1-10 s 27 %, 10-60 s 8 %, more 4 %, at most 600 s
    (`trace.TOOL_GAP_QUANTILES`)
model seconds
    46 ms per output token + 29 ms per 1,000 new tokens (zetxqx, `trace.Call.model_s`)
context limit
    64K tokens: a session that would pass it ends there (our assumption)
"""

from __future__ import annotations

import math
import random

from vllm_saga.simulator.trace import TOOL_GAP_QUANTILES, Call, Session, SharedPrefix, quantile

MEAN_CALLS = 37.0
CALLS_CV = 0.5
FIRST_PROMPT_TOKENS = (2_000, 4_000)
SHARED_PREFIX_TOKENS = 1_500
AGENTS = ("coder-a", "coder-b", "coder-c")
OUTPUT_TOKENS = (100, 500)
RESULT_MEAN_TOKENS = 480.0
RESULT_SIGMA = 1.0
RESULT_CAP_TOKENS = 8_000
CONTEXT_LIMIT_TOKENS = 65_536


def sessions(count: int, seed: int = 0) -> list[Session]:
    """`count` synthetic coding-agent sessions; session k is the same whatever `count` is."""
    return [_session(seed, index) for index in range(count)]


def _session(seed: int, index: int) -> Session:
    """Draw one session."""
    rng = random.Random(f"builtin/{seed}/{index}")
    shape = 1.0 / CALLS_CV**2
    steps = max(2, round(rng.gammavariate(shape, MEAN_CALLS / shape)))
    drawn = calls(rng, steps)
    return Session(
        session_id=f"builtin-{seed}-{index}",
        calls=drawn,
        source="builtin",
        shared_prefix=SharedPrefix(group=rng.choice(AGENTS), tokens=SHARED_PREFIX_TOKENS),
    )


def calls(rng: random.Random, steps: int) -> tuple[Call, ...]:
    """One chain of `steps` calls; fewer where the next one would pass the context limit."""
    chain: list[Call] = []
    context = 0
    for step in range(steps):
        new = rng.randint(*FIRST_PROMPT_TOKENS) if step == 0 else _result_tokens(rng)
        output = rng.randint(*OUTPUT_TOKENS)
        gap_s = quantile(rng.random(), TOOL_GAP_QUANTILES)
        if step and context + new + output > CONTEXT_LIMIT_TOKENS:
            break
        chain.append(
            Call(
                prompt_tokens=context + new,
                new_tokens=new,
                output_tokens=output,
                tool_latency_s=gap_s,
                gap="tool",
            )
        )
        context += new + output
    last = chain[-1]
    chain[-1] = Call(last.prompt_tokens, last.new_tokens, last.output_tokens, gap="end")
    return tuple(chain)


def _result_tokens(rng: random.Random) -> int:
    """Length of one tool result, in tokens."""
    mu = math.log(RESULT_MEAN_TOKENS) - RESULT_SIGMA**2 / 2
    return max(1, min(RESULT_CAP_TOKENS, round(rng.lognormvariate(mu, RESULT_SIGMA))))
