"""Replaying sessions over HTTP: closed-loop lanes, each running one session after another.

A session is a small graph: a call is issued `delay_s x gap_scale` after the last call it depends on
has ended. Prompts are sent to `/v1/completions` as token ids, or as the words that stand for them;
the tokens really generated become part of the next prompt. No end-of-session signal is sent: real
agents send none.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec

from benchmarks.live import words
from benchmarks.live.scale import ScaledSession
from benchmarks.live.tokens import TokenSource

#: Seconds one request may take; above any hold limit a scheduler may have.
REQUEST_TIMEOUT_S = 3600.0


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    system_fingerprint: str | None = None
    error: msgspec.Raw | None = None


_DECODER = msgspec.json.Decoder(_Chunk)


class RequestFailed(RuntimeError):
    """The server refused a request, broke the stream, or answered with other lengths than asked."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One finished call. Times are seconds on the client's clock, tokens as the server counted.

    `replica` is what the server calls itself; `decision` is why our router sent it there.
    """

    session_id: str
    index: int
    issued: float
    first_token: float
    ended: float
    prompt_tokens: int
    reusable_tokens: int
    cached_tokens: int
    output_tokens: int
    model_s: float
    replica: str | None = None
    decision: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.first_token - self.issued

    @property
    def latency_s(self) -> float:
        return self.ended - self.issued


@dataclass(slots=True)
class SessionRecord:
    """One session; `error` is None if it completed."""

    session_id: str
    started: float
    ended: float = 0.0
    calls: list[CallRecord] = field(default_factory=list)
    error: str | None = None

    @property
    def completion_s(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to send. `as_words`: prompts are text (`words.py`), not token ids."""

    url: str
    vocabulary: int
    namespace: str
    send_session_ids: bool = True
    as_words: bool = False


@dataclass(frozen=True, slots=True)
class Hooks:
    """Callbacks of the progress display and of the calibration."""

    gap_scale: Callable[[], float]
    on_call: Callable[[CallRecord], None] = lambda record: None
    on_session: Callable[[SessionRecord], None] = lambda record: None


def client() -> aiohttp.ClientSession:
    """An HTTP client without a connection limit and with room for one long event."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=30),
        read_bufsize=2**22,
    )


async def replay(
    http: aiohttp.ClientSession,
    target: Target,
    sessions: Sequence[ScaledSession],
    lanes: int,
    hooks: Hooks,
) -> list[SessionRecord]:
    """Run all sessions on `lanes` lanes; a lane takes the next session when its own has ended."""
    queue = iter(sessions)
    records: list[SessionRecord] = []

    async def lane() -> None:
        for session in queue:
            record = await run_session(http, target, session, hooks)
            records.append(record)
            hooks.on_session(record)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(lanes, len(sessions))):
            group.create_task(lane())
    return records


async def run_session(
    http: aiohttp.ClientSession, target: Target, session: ScaledSession, hooks: Hooks
) -> SessionRecord:
    """Run one session whole; a failed request ends it and is kept as its error."""
    source = TokenSource(session, target.vocabulary, target.namespace)
    record = SessionRecord(session.session_id, started=time.perf_counter())
    tasks: list[asyncio.Task[None]] = []

    async def step(index: int) -> None:
        call = session.calls[index]
        for dep in call.deps:
            await tasks[dep]
        await asyncio.sleep(call.delay_s * hooks.gap_scale())
        finished = await send(http, target, session, index, source)
        record.calls.append(finished)
        hooks.on_call(finished)

    try:
        async with asyncio.TaskGroup() as group:
            for index in range(len(session.calls)):
                tasks.append(group.create_task(step(index)))
    except* (RequestFailed, aiohttp.ClientError, TimeoutError, OSError) as errors:
        first = errors.exceptions[0]
        record.error = f"{type(first).__name__}: {first}"
    record.ended = time.perf_counter()
    return record


async def send(
    http: aiohttp.ClientSession,
    target: Target,
    session: ScaledSession,
    index: int,
    source: TokenSource,
) -> CallRecord:
    """Send one call, read its stream to the end and remember the context it leaves."""
    call = session.calls[index]
    prompt = source.prompt(index)
    body = {
        "model": "model", "prompt": words.write(prompt) if target.as_words else prompt,
        "temperature": 0, "return_token_ids": not target.as_words,
        "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": call.output_tokens, "min_tokens": call.output_tokens, "ignore_eos": True,
    }  # fmt: skip
    headers = {"Content-Type": "application/json"}
    if target.send_session_ids:
        headers["X-Session-ID"] = session.session_id
    answer = _Answer()
    issued = time.perf_counter()
    async with http.post(
        f"{target.url}/v1/completions", data=json.dumps(body), headers=headers
    ) as response:
        if response.status != 200:
            raise RequestFailed(
                f"call {index}: HTTP {response.status}: {(await response.text())[:300]}"
            )
        await answer.read(response, index)
    ended = time.perf_counter()
    generated = answer.tokens(target.as_words)
    usage = answer.usage
    if usage is None or len(generated) != call.output_tokens or usage.prompt_tokens != len(prompt):
        raise RequestFailed(
            f"call {index}: asked for {call.output_tokens} tokens, got {len(generated)}; {usage}"
        )
    source.complete(index, prompt, generated)
    details = usage.prompt_tokens_details
    kept = session.calls[call.parent].kv_tokens if call.parent is not None else 0
    return CallRecord(
        session.session_id, index, issued, answer.first_token, ended,
        len(prompt), min(call.reusable_tokens, kept),
        (details.cached_tokens or 0) if details else 0, len(generated), call.model_s,
        answer.fingerprint, response.headers.get("x-saga-decision"),
    )  # fmt: skip


class _Answer:
    """A stream as far as it has come."""

    def __init__(self) -> None:
        self.first_token = 0.0
        self.usage: _Usage | None = None
        self.fingerprint: str | None = None
        self._ids: list[int] = []
        self._text: list[str] = []

    async def read(self, response: aiohttp.ClientResponse, index: int) -> None:
        """Read to the end. Raises `RequestFailed` where the server reports an error."""
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = _DECODER.decode(line[6:])
            if chunk.error is not None:
                raise RequestFailed(f"call {index}: {bytes(chunk.error)[:300]!r}")
            self.usage = chunk.usage or self.usage
            self.fingerprint = chunk.system_fingerprint or self.fingerprint
            for choice in chunk.choices:
                if choice.text or choice.token_ids:
                    self.first_token = self.first_token or time.perf_counter()
                self._ids += choice.token_ids or ()
                self._text.append(choice.text)

    def tokens(self, as_words: bool) -> list[int]:
        """What was generated. Raises `RequestFailed` where that is not made of words."""
        if not as_words:
            return self._ids
        try:
            return words.read("".join(self._text))
        except ValueError as error:
            raise RequestFailed(str(error)) from None
