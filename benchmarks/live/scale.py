"""Scaling a recorded workload to a small model on a CPU.

* tokens x `token_scale`, chosen so that the mean prompt of the sample has a given length;
* gaps x `gap_scale` = measured model seconds per call without pressure / recorded model seconds per
  call, so that the share of time spent in the model (the duty cycle) is kept;
* the KV pool from `overcommit = lanes x time-mean context of a live session / pool`.

Rounding never accumulates: every prompt is `round(recorded x token_scale)` and its new part is what
the reused part leaves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_saga.simulator.trace import Session


@dataclass(frozen=True, slots=True)
class ScaledCall:
    """One request to send. Tokens are scaled; seconds are recorded ones, scaled at replay."""

    prompt_tokens: int
    reusable_tokens: int
    output_tokens: int
    parent: int | None
    deps: tuple[int, ...]
    delay_s: float
    model_s: float

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV exists when the call ends: the last one generated was never fed back."""
        return self.context_tokens - 1


@dataclass(frozen=True, slots=True)
class ScaledSession:
    """One session to replay; `prefix_*` is the front it shares with its group."""

    session_id: str
    calls: tuple[ScaledCall, ...]
    prefix_group: str | None
    prefix_tokens: int
    ideal_s: float
    mean_context_tokens: float

    @property
    def max_context_tokens(self) -> int:
        return max(call.context_tokens for call in self.calls)

    @property
    def model_s(self) -> float:
        return sum(call.model_s for call in self.calls)


def pick(sessions: Sequence[Session], count: int, seed: int) -> list[tuple[str, Session]]:
    """`count` (id, session) pairs in a seeded order; a short trace is used again under new ids."""
    order = sorted(
        sessions, key=lambda s: hashlib.sha256(f"{seed}/{s.session_id}".encode()).digest()
    )
    pairs = []
    for k in range(count):
        round_, index = divmod(k, len(order))
        session = order[index]
        pairs.append(
            (session.session_id if round_ == 0 else f"{session.session_id}#{round_ + 1}", session)
        )
    return pairs


def token_scale(sessions: Sequence[Session], mean_prompt_tokens: float) -> float:
    """Scale that gives the calls of `sessions` this mean prompt length."""
    prompts = [call.prompt_tokens for session in sessions for call in session.calls]
    return mean_prompt_tokens / (sum(prompts) / len(prompts))


def scale_session(name: str, session: Session, scale: float, gap_cap_s: float) -> ScaledSession:
    """Apply the token scale to one session, keeping its reuse structure exact."""
    calls: list[ScaledCall] = []
    for i, call in enumerate(session.calls):
        parent = session.parents[i]
        reusable = 0
        if parent is not None:
            before, scaled = session.calls[parent], calls[parent]
            if call.reusable_tokens >= before.context_tokens:
                reusable = scaled.context_tokens
            elif call.reusable_tokens >= before.prompt_tokens:
                extra = round((call.reusable_tokens - before.prompt_tokens) * scale)
                reusable = min(scaled.prompt_tokens + extra, scaled.context_tokens)
            else:
                reusable = min(round(call.reusable_tokens * scale), scaled.prompt_tokens)
        calls.append(
            ScaledCall(
                prompt_tokens=max(round(call.prompt_tokens * scale), reusable + 1),
                reusable_tokens=reusable,
                output_tokens=max(1, round(call.output_tokens * scale)),
                parent=parent,
                deps=session.deps[i],
                delay_s=min(session.delays_s[i], gap_cap_s),
                model_s=call.model_s,
            )
        )
    prefix = session.shared_prefix
    shared = round((prefix.tokens or 0) * scale) if prefix else 0
    return ScaledSession(
        session_id=name,
        calls=tuple(calls),
        prefix_group=prefix.group if prefix else None,
        prefix_tokens=min(shared, calls[0].prompt_tokens - 1),
        ideal_s=session.ideal_s,
        mean_context_tokens=scale * session.context_token_seconds / session.ideal_s
        if session.ideal_s
        else 0.0,
    )


def mean_context_tokens(sessions: Sequence[ScaledSession]) -> float:
    """Time-mean context of a live session, in scaled tokens: long sessions count for longer."""
    total_s = sum(session.ideal_s for session in sessions)
    return sum(session.mean_context_tokens * session.ideal_s for session in sessions) / total_s


def duty(sessions: Sequence[ScaledSession]) -> float:
    """Recorded share of a session's ideal time that is spent in the model."""
    return sum(session.model_s for session in sessions) / sum(
        session.ideal_s for session in sessions
    )


@dataclass(frozen=True, slots=True)
class Pool:
    """Size of the KV pool. `blocks` includes the null block that vLLM keeps for itself."""

    blocks: int
    block_size: int
    overcommit: float

    @property
    def tokens(self) -> int:
        return (self.blocks - 1) * self.block_size


def pool(
    sessions: Sequence[ScaledSession],
    lanes: float,
    overcommit: float,
    block_size: int,
    largest_tokens: int = 0,
) -> Pool:
    """KV pool for `lanes` live sessions at `overcommit`; never below the largest request plus 10 %.

    `largest_tokens`: a request outside `sessions` that must fit too. The returned `overcommit` is
    the one the block count really gives.
    """
    if overcommit <= 0:
        raise ValueError("overcommit must be positive")
    wanted = lanes * mean_context_tokens(sessions)
    largest = max(largest_tokens, *(session.max_context_tokens for session in sessions))
    blocks = max(math.ceil(wanted / overcommit / block_size), math.ceil(largest * 1.1 / block_size))
    return Pool(blocks + 1, block_size, wanted / (blocks * block_size))
