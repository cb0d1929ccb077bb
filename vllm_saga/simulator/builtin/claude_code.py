"""Interactive coding agents: tools, human pauses, compactions, sub-agents, long contexts.

Sources: [K] callanjfox/kv-cache-tester, recorded Claude Code sessions (commit 94f6046; start of
session from its documentation, the rest quantiles of 369 sessions); [T] TraceLab, arXiv 2606.30560;
[C] AgentCgroup, arXiv 2602.09345, Claude Code on SWE-rebench (quantiles of 110 sessions);
[V] vLLM's AgentX corpus, https://vllm.ai/blog/2026-09-08-vllm-agentx.

calls of the main agent
    p50 48, p90 144, at most 514 [K]; [V] has a median of 43
first prompt
    p25 16.5K, p50 20.2K, p75 71.2K [K]; the ends (15.7K, 150K) are ours
shared prefix
    15,000 tokens of tools and system prompt (8-13K and 2-4K in [K]); three versions of the product
new tokens
    p50 342, p90 4,023 [K]. Pure appends are put at 300 and 2,900, cut at 60K: context edits and the
    reports of sub-agents come on top.
output
    p50 218, p90 920 [K], cut at 8K; [V] has a mean of 444
gaps
    12 % of the calls are answered by a human [K]: log-normal, median 86 s, sigma 2.09, at most one
    hour [T]. All others run a tool: frequencies and latencies of `TOOLS`.
context edits
    6 % of the calls change something in the middle of their context [K]. The part that has to be
    computed again is u^3 of the prompt, u uniform (gives the published p99 of 58K new tokens).
compaction
    A call that would pass the model's window starts from the system prompt and a summary of 5-15K
    tokens (assumption). The window is 200K, in a quarter of the sessions 1M (assumption: one prompt
    in ten exceeds 206K in [K]).
sub-agents
    44 % of the sessions have some [V]. Number, size and start of them are assumptions: a burst for
    every 40 calls, of 1-4 sub-agents that run side by side; calls p50 6, p90 14; first prompt
    8-12K; they start within a second and their parent waits for all.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

from vllm_saga.simulator.builtin.draw import LogNormal, stream
from vllm_saga.simulator.trace import (
    HUMAN_GAP_CAP_S,
    HUMAN_GAP_LN,
    Call,
    Gap,
    Session,
    SharedPrefix,
    quantile,
)

Knots = tuple[tuple[float, float], ...]
#: `tool`, `tool_latency_s` and `gap` of a call.
_After = tuple[str | None, float | None, Gap]

CALLS = LogNormal(48, 144)
MAX_CALLS = 514
SHARED_PREFIX_TOKENS = 15_000
VERSIONS = ("claude-code-a", "claude-code-b", "claude-code-c")
WINDOWS_TOKENS = (200_000, 200_000, 200_000, 1_000_000)
SUMMARY_TOKENS = (5_000, 15_000)
MAX_NEW_TOKENS = 60_000
MAX_OUTPUT_TOKENS = 8_000
CALLS_PER_BURST = 40
BURST_SIZES = (1, 1, 2, 3, 4)
SUB_CALLS = LogNormal(6, 14)
MAX_SUB_CALLS = 40
SUB_FIRST_PROMPT = ((0.0, 8_000), (1.0, 12_000))
SUB_START_S = (0.2, 1.0)


class Tool(NamedTuple):
    """How often a tool is called, in calls per thousand, and how many seconds it takes."""

    per_mille: int
    latency_s: Knots


_LOOKUP: Knots = ((0.0, 0.02), (0.25, 0.03), (0.5, 0.04), (0.9, 0.08), (0.99, 0.14), (1.0, 1.0))
#: Frequencies: [C], Claude sessions. Latencies: [C], Claude sessions; Bash: quartile of [C], median
#: and p99 of shells in [T], between them so that all tools together have the tail of [T] (60 s or
#: more in 3-4 %); WebFetch: mean 16 s in [C].
TOOLS = {
    "Bash": Tool(
        505,
        ((0.0, 0.01), (0.25, 0.12), (0.5, 0.85), (0.82, 10), (0.94, 60), (0.99, 235), (1, 600)),
    ),
    "Read": Tool(
        180, ((0.0, 0.02), (0.25, 0.03), (0.5, 0.04), (0.9, 0.11), (0.99, 0.31), (1.0, 1.0))
    ),
    "Edit": Tool(105, _LOOKUP),
    "TodoWrite": Tool(85, _LOOKUP),
    "Grep": Tool(61, _LOOKUP),
    "Write": Tool(23, _LOOKUP),
    "Glob": Tool(21, _LOOKUP),
    "WebFetch": Tool(20, ((0.0, 1.0), (0.5, 9.0), (0.9, 35.0), (1.0, 120.0))),
}


class Profile(NamedTuple):
    """How one way of using the product differs from another. Shares are of 1."""

    first_prompt: Knots
    new: LogNormal
    output: LogNormal
    human_share: float
    edit_share: float
    subagent_share: float


INTERACTIVE = Profile(
    first_prompt=((0.0, 15_700), (0.25, 16_512), (0.5, 20_160), (0.75, 71_168), (1.0, 150_000)),
    new=LogNormal(300, 2_900),
    output=LogNormal(218, 920),
    human_share=0.12,
    edit_share=0.06,
    subagent_share=0.44,
)
#: One task without a human, all figures from [C]; its sessions start at about 15K.
AUTONOMOUS = Profile(
    first_prompt=((0.0, 15_100), (1.0, 17_000)),
    new=LogNormal(274, 1_466),
    output=LogNormal(119, 534),
    human_share=0.0,
    edit_share=0.0,
    subagent_share=0.07,
)


def sessions(count: int, seed: int = 0) -> list[Session]:
    """`count` interactive sessions; session k is the same whatever `count` is."""
    return [_session(seed, index) for index in range(count)]


def _session(seed: int, index: int) -> Session:
    """Draw one session."""
    rng = stream("claude-code", seed, index)
    return Session(
        session_id=f"claude-code-{seed}-{index}",
        calls=calls(rng, CALLS.whole(rng, 2, MAX_CALLS), INTERACTIVE),
        source="builtin",
        shared_prefix=SharedPrefix(group=rng.choice(VERSIONS), tokens=SHARED_PREFIX_TOKENS),
    )


def calls(rng: random.Random, steps: int, profile: Profile) -> tuple[Call, ...]:
    """`steps` calls of the main agent, and between them those of its sub-agents."""
    drawn: list[Call] = []
    bursts = _burst_steps(rng, steps, profile.subagent_share)
    window = rng.choice(WINDOWS_TOKENS)
    last: Call | None = None
    reports = 0
    deps: tuple[int, ...] | None = None
    for step in range(steps):
        prompt, new, kind = _prompt(rng, profile, last, reports, window)
        output = profile.output.whole(rng, 1, MAX_OUTPUT_TOKENS)
        after: _After = (None, None, "end")
        if step in bursts:
            after = ("Task", None, "subagents")
        elif step < steps - 1:
            after = _gap(rng, profile.human_share)
        last = Call(prompt, new, output, *after, kind=kind, deps=deps)
        drawn.append(last)
        reports, deps = 0, None
        if step in bursts:
            spawn = len(drawn) - 1
            ends = _burst(rng, profile, drawn, spawn)
            reports = sum(drawn[end].output_tokens for end in ends)
            deps = (spawn, *ends)
    return tuple(drawn)


def _burst_steps(rng: random.Random, steps: int, share: float) -> set[int]:
    """The steps of the main agent that start sub-agents: none in most sessions."""
    if rng.random() >= share or steps < 2:
        return set()
    return set(rng.sample(range(steps - 1), max(1, min(steps - 1, steps // CALLS_PER_BURST))))


def _prompt(
    rng: random.Random, profile: Profile, last: Call | None, reports: int, window: int
) -> tuple[int, int, Literal["branch"] | None]:
    """Prompt tokens, new tokens and kind of the main agent's next call."""
    if last is None:
        first = round(quantile(rng.random(), profile.first_prompt))
        return first, first, None
    new = profile.new.whole(rng, 1, MAX_NEW_TOKENS) + reports
    prompt = last.context_tokens + new
    if prompt + MAX_OUTPUT_TOKENS > window:
        summary = rng.randint(*SUMMARY_TOKENS)
        return SHARED_PREFIX_TOKENS + summary, summary, "branch"
    if rng.random() < profile.edit_share:
        kept = round(last.prompt_tokens * (1 - rng.random() ** 3))
        kept = max(SHARED_PREFIX_TOKENS, kept)
        return prompt, prompt - kept, "branch"
    return prompt, new, None


def _gap(rng: random.Random, human_share: float) -> _After:
    """What follows a call that is not the last."""
    if rng.random() < human_share:
        return None, min(HUMAN_GAP_CAP_S, rng.lognormvariate(*HUMAN_GAP_LN)), "human"
    [name] = rng.choices(list(TOOLS), [tool.per_mille for tool in TOOLS.values()])
    return name, quantile(rng.random(), TOOLS[name].latency_s), "tool"


def _burst(rng: random.Random, profile: Profile, drawn: list[Call], spawn: int) -> tuple[int, ...]:
    """Append the calls of sub-agents that run side by side; returns the last call of each."""
    profile = profile._replace(first_prompt=SUB_FIRST_PROMPT, edit_share=0.0)
    before = len({call.agent for call in drawn if call.agent})
    lengths = [SUB_CALLS.whole(rng, 1, MAX_SUB_CALLS) for _ in range(rng.choice(BURST_SIZES))]
    ends = [spawn] * len(lengths)
    for step in range(max(lengths)):
        for k, length in enumerate(lengths):
            if step >= length:
                continue
            first = step == 0
            last = None if first else drawn[ends[k]]
            prompt, new, kind = _prompt(rng, profile, last, 0, WINDOWS_TOKENS[0])
            output = profile.output.whole(rng, 1, MAX_OUTPUT_TOKENS)
            after = (None, None, "end") if step == length - 1 else _gap(rng, human_share=0.0)
            drawn.append(
                Call(
                    prompt,
                    new,
                    output,
                    *after,
                    kind="root" if first else kind,
                    parent=spawn if first else None,
                    deps=(ends[k],),
                    delay_s=rng.uniform(*SUB_START_S) if first else None,
                    agent=f"sub-{before + k + 1}",
                )
            )
            ends[k] = len(drawn) - 1
    return tuple(ends)
