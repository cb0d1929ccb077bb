"""The replayer against a stand-in for the server: order, headers, lanes, failures."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from benchmarks.live import replay, words
from benchmarks.live.scale import ScaledCall, ScaledSession

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class FakeServer:
    """Answers completions with the id 9; refuses sessions named in `refuse`.

    Prompts of words are answered with words, or with `garbage`.
    """

    refuse: set[str] = field(default_factory=set)
    short: bool = False
    garbage: str = ""
    url: str = ""
    seen: list[tuple[str | None, list[int] | str]] = field(default_factory=list)
    alive: set[str | None] = field(default_factory=set)
    most_alive: int = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        session = request.headers.get("X-Session-ID")
        self.seen.append((session, body["prompt"]))
        if session in self.refuse:
            return web.Response(status=500, text="no")
        self.alive.add(session)
        self.most_alive = max(self.most_alive, len(self.alive))
        await asyncio.sleep(0.01)
        self.alive.discard(session)
        headers = {"Content-Type": "text/event-stream", "x-saga-decision": "new"}
        answer = web.StreamResponse(headers=headers)
        await answer.prepare(request)
        count = body["max_tokens"] - self.short
        choice = {"token_ids": [9] * count, "text": ""}
        length = len(body["prompt"])
        if isinstance(body["prompt"], str):
            choice = {"text": self.garbage or words.write([9] * count)}
            length //= words.WIDTH
        chunks = [{"choices": [choice]}]
        usage = {"prompt_tokens": length, "completion_tokens": count}
        chunks.append(
            {
                "choices": [],
                "usage": usage | {"prompt_tokens_details": None},
                "system_fingerprint": "replica-7",
            }
        )
        for chunk in chunks:
            await answer.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        return answer


@asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[FakeServer]:
    app = web.Application()
    app.router.add_post("/v1/completions", fake.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


def session(name: str, calls: int = 3) -> ScaledSession:
    made = [ScaledCall(20, 0, 4, None, (), 0.0, 1.0)]
    for k in range(1, calls):
        whole = made[-1].context_tokens
        made.append(ScaledCall(whole + 5, whole, 4, k - 1, (k - 1,), 0.0, 1.0))
    return ScaledSession(name, tuple(made), None, 0, 1.0, 1.0)


async def run(
    fake: FakeServer,
    sessions: list[ScaledSession],
    lanes: int,
    ids: bool = True,
    as_words: bool = False,
):
    async with serving(fake), replay.client() as http:
        target = replay.Target(fake.url, 512, "test", send_session_ids=ids, as_words=as_words)
        return await replay.replay(http, target, sessions, lanes, replay.Hooks(lambda: 1.0))


async def test_prompts_grow_by_what_the_server_generated() -> None:
    fake = FakeServer()
    [record] = await run(fake, [session("a")], lanes=1)
    assert record.error is None and record.ended > record.started
    first, second, third = (prompt for _, prompt in fake.seen)
    assert second[:24] == [*first, 9, 9, 9, 9]
    assert third[:33] == [*second, 9, 9, 9, 9]
    assert {name for name, _ in fake.seen} == {"a"}
    # The last generated token has no KV yet, so it is not counted as reusable.
    assert [call.reusable_tokens for call in record.calls] == [0, 23, 32]


async def test_prompts_of_words_are_those_of_ids() -> None:
    by_id, by_word = FakeServer(), FakeServer()
    await run(by_id, [session("a")], lanes=1)
    [record] = await run(by_word, [session("a")], lanes=1, as_words=True)
    assert record.error is None
    prompts = [prompt for _, prompt in by_word.seen]
    assert [words.read(prompt) for prompt in prompts] == [prompt for _, prompt in by_id.seen]


async def test_an_answer_that_is_not_made_of_words_is_a_failure() -> None:
    [record] = await run(FakeServer(garbage="??"), [session("a")], lanes=1, as_words=True)
    assert record.error is not None and "no word" in record.error


async def test_who_answered_and_why_is_kept() -> None:
    [record] = await run(FakeServer(), [session("a")], lanes=1)
    assert {(call.replica, call.decision) for call in record.calls} == {("replica-7", "new")}


async def test_lanes_bound_the_number_of_live_sessions() -> None:
    fake = FakeServer()
    records = await run(fake, [session(f"s{k}") for k in range(9)], lanes=3)
    assert len(records) == 9 and not any(record.error for record in records)
    assert fake.most_alive == 3


async def test_session_ids_can_be_left_out() -> None:
    fake = FakeServer()
    await run(fake, [session("a")], lanes=1, ids=False)
    assert {name for name, _ in fake.seen} == {None}


async def test_a_failed_request_fails_its_session_only() -> None:
    fake = FakeServer(refuse={"bad"})
    records = await run(fake, [session("good"), session("bad")], lanes=2)
    errors = {record.session_id: record.error for record in records}
    assert errors["good"] is None
    assert errors["bad"] == "RequestFailed: call 0: HTTP 500: no"


async def test_wrong_lengths_are_failures() -> None:
    [record] = await run(FakeServer(short=True), [session("a")], lanes=1)
    assert record.error is not None and "asked for 4 tokens, got 3" in record.error


async def test_sub_agents_run_at_once_and_are_waited_for() -> None:
    """Call 0, then two sub-agents (1, 2) at the same time, then call 3."""
    calls = (
        ScaledCall(20, 0, 4, None, (), 0.0, 1.0),
        ScaledCall(10, 0, 4, 0, (0,), 0.0, 1.0),
        ScaledCall(11, 0, 4, 0, (0,), 0.0, 1.0),
        ScaledCall(30, 24, 4, 0, (0, 1, 2), 0.0, 1.0),
    )
    fake = FakeServer()
    [record] = await run(fake, [ScaledSession("a", calls, None, 0, 1.0, 1.0)], lanes=1)
    spans = {call.index: (call.issued, call.ended) for call in record.calls}
    assert spans[2][0] < spans[1][1] and spans[1][0] < spans[2][1]
    assert spans[3][0] >= max(spans[1][1], spans[2][1])
