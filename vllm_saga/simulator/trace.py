"""Agent traces, format v1: one JSON object per line, one session (workflow) per object.

A session is a list of LLM calls. Every call names its prompt and output length in tokens, how many
prompt tokens are new with respect to the call it extends (its *parent*), and the gap in seconds
before the next call. The reader checks everything it uses and names file, line and field when
something is wrong; fields it does not know are ignored, so a trace may carry more than is listed
here.

Pure data: this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from vllm_saga.policy.undecodable import UNDECODABLE

Tokens = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Index = Annotated[int, msgspec.Meta(ge=0)]
Gap = Literal["tool", "human", "subagents", "handoff", "end"]

#: Model seconds of a call for which a trace records none: one engine step per output token plus
#: prefill of the new tokens (46 ms + 29 ms per 1,000 tokens, measured by zetxqx on 2xH100).
STEP_S = 0.046
PREFILL_S_PER_TOKEN = 29e-6

#: Tool gaps as published by TraceLab (arXiv 2606.30560): share of calls within so many seconds.
#: The ends (10 ms, 600 s) are ours.
TOOL_GAP_QUANTILES: tuple[tuple[float, float], ...] = (
    (0.0, 0.01),
    (0.61, 1.0),
    (0.88, 10.0),
    (0.96, 60.0),
    (1.0, 600.0),
)
#: Human replies: log-normal, median 86 s, sigma 2.09, at most one hour (same source).
HUMAN_GAP_LN = (math.log(86.0), 2.09)
HUMAN_GAP_CAP_S = 3600.0


class TraceError(ValueError):
    """A trace file that cannot be used; the message names file, line and field."""


class SharedPrefix(msgspec.Struct, frozen=True):
    """Tokens at the front of a session's first call that every session of `group` shares."""

    group: str
    tokens: Tokens | None = None


class Call(msgspec.Struct, frozen=True):
    """One LLM call of a session; token counts are whole tokens, times are seconds."""

    prompt_tokens: Tokens
    new_tokens: Tokens
    output_tokens: Annotated[int, msgspec.Meta(ge=1)]
    tool: str | None = None
    tool_latency_s: Seconds | None = None
    gap: Gap | None = None
    kind: Literal["branch", "root"] | None = None
    parent: Index | None = None
    deps: tuple[Index, ...] | None = None
    delay_s: Seconds | None = None
    agent: str | None = None
    subagent_type: str | None = None
    llm_s: Seconds | None = None
    ttft_s: Seconds | None = None
    aborted: bool = False

    @property
    def reusable_tokens(self) -> int:
        """Prompt tokens whose KV exists already if nothing was evicted."""
        return self.prompt_tokens - self.new_tokens

    @property
    def context_tokens(self) -> int:
        """Tokens of KV this call leaves behind."""
        return self.prompt_tokens + self.output_tokens

    @property
    def model_s(self) -> float:
        """Recorded model seconds, or the published step-time estimate where none was recorded."""
        if self.llm_s is not None:
            return self.llm_s
        return STEP_S * self.output_tokens + PREFILL_S_PER_TOKEN * self.new_tokens


class Session(msgspec.Struct, frozen=True, dict=True):
    """One workflow: its calls in order of start, and the links between them made explicit."""

    session_id: Annotated[str, msgspec.Meta(min_length=1)]
    calls: Annotated[tuple[Call, ...], msgspec.Meta(min_length=1)]
    source: str | None = None
    tenant: str | None = None
    arrival_s: Seconds | None = None
    model: str | None = None
    shared_prefix: SharedPrefix | None = None

    @cached_property
    def parents(self) -> tuple[int | None, ...]:
        """Per call, the index of the call whose context it extends; None for the first.

        Default: the previous call of the same thread (`agent`), else the previous call.
        """
        last: dict[str | None, int] = {}
        out: list[int | None] = []
        for i, call in enumerate(self.calls):
            default = last.get(call.agent, i - 1) if i else None
            out.append(call.parent if call.parent is not None else default)
            last[call.agent] = i
        return tuple(out)

    @cached_property
    def deps(self) -> tuple[tuple[int, ...], ...]:
        """Per call, the calls that must finish before it is issued; default: the previous call."""
        return tuple(
            call.deps if call.deps is not None else ((i - 1,) if i else ())
            for i, call in enumerate(self.calls)
        )

    @cached_property
    def delays_s(self) -> tuple[float, ...]:
        """Per call, seconds from the end of its last dependency to its issue.

        `delay_s` where recorded; 0 after sub-agents (their run is the gap); otherwise the gap
        recorded on the call before, or a drawn one (`fill_gap_s`) where it is unknown.
        """
        out = []
        for i, call in enumerate(self.calls):
            if call.delay_s is not None:
                out.append(call.delay_s)
            elif not self.deps[i] or (call.deps is not None and len(call.deps) > 1):
                out.append(0.0)
            else:
                before = self.deps[i][-1]
                latency = self.calls[before].tool_latency_s
                out.append(
                    latency
                    if latency is not None
                    else fill_gap_s(self.session_id, before, self.calls[before].gap)
                )
        return tuple(out)

    @cached_property
    def timeline(self) -> tuple[tuple[float, float], ...]:
        """Per call, (start, end) in seconds from the session's start if no call ever waits."""
        spans: list[tuple[float, float]] = []
        for i, call in enumerate(self.calls):
            ready = max((spans[d][1] for d in self.deps[i]), default=0.0)
            start = ready + self.delays_s[i]
            spans.append((start, start + call.model_s))
        return tuple(spans)

    @property
    def ideal_s(self) -> float:
        """Seconds the session takes if no call ever waits."""
        return max(end for _, end in self.timeline)

    @cached_property
    def context_token_seconds(self) -> float:
        """Integral over the ideal timeline of the tokens the session wants to keep.

        A call's context counts from its start until the call that extends it starts, or until its
        own end if none does.
        """
        successor: dict[int, float] = {}
        for i, parent in enumerate(self.parents):
            if parent is not None and self.calls[i].agent == self.calls[parent].agent:
                start = self.timeline[i][0]
                successor[parent] = max(start, successor.get(parent, 0.0))
        total = 0.0
        for i, call in enumerate(self.calls):
            start, end = self.timeline[i]
            total += call.context_tokens * (max(successor.get(i, end), end) - start)
        return total

    @property
    def model_s(self) -> float:
        """Sum of model seconds over all calls."""
        return sum(call.model_s for call in self.calls)


def fill_gap_s(session_id: str, call: int, gap: Gap | None) -> float:
    """Draw the gap after a call that recorded none; the same for every run and every arm.

    Sub-agents and the end of a thread have no gap of their own. Human gaps follow a log-normal,
    everything else the published quantiles, interpolated in log space.
    """
    if gap in ("subagents", "end"):
        return 0.0
    digest = hashlib.sha256(f"gap/{session_id}/{call}".encode()).digest()
    rng = random.Random(digest)
    if gap == "human":
        return min(HUMAN_GAP_CAP_S, rng.lognormvariate(*HUMAN_GAP_LN))
    return quantile(rng.random(), TOOL_GAP_QUANTILES)


def quantile(u: float, knots: Sequence[tuple[float, float]]) -> float:
    """Value at probability `u`, interpolating log(value) between (probability, value) knots."""
    for (p0, v0), (p1, v1) in itertools.pairwise(knots):
        if u <= p1:
            return v0 * (v1 / v0) ** ((u - p0) / (p1 - p0))
    return knots[-1][1]


def read(path: Path | str) -> list[Session]:
    """Read a whole trace file; raises `TraceError` naming file, line and field."""
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror}") from error
    sessions = list(_parse(path, lines))
    if not sessions:
        raise TraceError(f"{path}: the trace holds no session")
    return sessions


def _parse(path: Path, lines: list[bytes]) -> Iterator[Session]:
    """Decode and check line by line."""
    decoder = msgspec.json.Decoder(Session)
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            session = decoder.decode(line)
        except msgspec.ValidationError as error:
            raise TraceError(f"{where}: {_readable(str(error))}") from error
        except UNDECODABLE as error:
            raise TraceError(f"{where}: not a JSON object: {error}") from error
        if session.session_id in seen:
            raise TraceError(
                f"{where}: session_id {session.session_id!r} was already used "
                f"on line {seen[session.session_id]}"
            )
        seen[session.session_id] = number
        check(session, where)
        yield session


def _readable(message: str) -> str:
    """`msg - at `$.calls[3].prompt_tokens`` → `calls[3].prompt_tokens: msg`."""
    text, _, place = message.partition(" - at `$.")
    return f"{place.rstrip('`')}: {text}" if place else text


def check(session: Session, where: str) -> None:
    """Check what types cannot say: token arithmetic and links that point backwards."""
    for i, call in enumerate(session.calls):
        field = f"{where}: calls[{i}]"
        if call.new_tokens > call.prompt_tokens:
            raise TraceError(
                f"{field}.new_tokens: {call.new_tokens} exceeds prompt_tokens {call.prompt_tokens}"
            )
        if call.prompt_tokens == 0:
            raise TraceError(f"{field}.prompt_tokens: must be at least 1")
        if call.parent is not None and call.parent >= i:
            raise TraceError(f"{field}.parent: {call.parent} is not an earlier call")
        for dep in call.deps or ():
            if dep >= i:
                raise TraceError(f"{field}.deps: {dep} is not an earlier call")
