"""Calls that a move takes back from one engine and sends to another."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import pytest
from aiohttp import web
from engines import Engine, Held, Seen, answer_chat, answer_pieces, fleet, until

from vllm_saga.router.fleet import Arrival, Decision, Move
from vllm_saga.router.replicas import BasePlacer, Replica


class Mover(BasePlacer):
    """Sends every call to the first replica that accepts; `moves` are what the next epoch says."""

    def __init__(self) -> None:
        super().__init__()
        self.placed: list[Arrival] = []
        self.begun: list[str] = []
        self.moves: list[Move] = []

    def choose(
        self, arrival: Arrival, accepting: Sequence[Replica], now: float
    ) -> tuple[Replica | None, str]:
        return (accepting[0] if accepting else None), "first"

    def place(self, arrival: Arrival, now: float, exclude: Collection[str] = ()) -> Decision | None:
        self.placed.append(arrival)
        return super().place(arrival, now, exclude)

    def on_first_byte(self, call_id: str, now: float) -> None:
        super().on_first_byte(call_id, now)
        self.begun.append(call_id)

    def epoch(self, now: float) -> Sequence[Move]:
        moves, self.moves = self.moves, []
        return moves

    def move(self, source: Engine, target: Engine) -> None:
        call = self.placed[-1]
        assert call.session is not None
        calls = (call.call_id,)
        self.moves = [Move(call.session, source.name, target.name, calls, "stolen", 3.0, 0.5)]


@pytest.mark.parametrize("headers_first", [True, False])
async def test_a_held_call_is_taken_back_and_answered_elsewhere(headers_first):
    placer, held = Mover(), Held(headers_first)
    source, target = Engine(held), Engine(answer_pieces([b"data: moved\n\n"]))
    async with fleet(source, target, placer=placer) as client:
        waiting = asyncio.create_task(client.chat(X_Session_ID="s"))
        await until(lambda: len(source.seen) == 1)
        placer.move(source, target)
        reply = await waiting
        await until(lambda: source.seen[0].aborted)
        flight = {b.name: b.in_flight for b in client.router.backends}
        shown = (await client.get("/v1/saga/sessions")).json()["sessions"]
        metrics = (await client.get("/metrics")).body.decode()
    assert (reply.status, reply.body) == (200, b"data: moved\n\n")
    assert reply.headers["x-saga-backend"] == target.name
    assert reply.headers["x-saga-decision"] == "stolen"
    assert target.seen[0].body == source.seen[0].body
    assert set(flight.values()) == {0}
    assert (shown[0]["backend"], shown[0]["moves"]) == (target.name, 1)
    assert len(placer.placed) == 1
    assert "saga_router_withdrawn_total 1.0" in metrics
    assert 'saga_router_moves_total{reason="stolen"} 1.0' in metrics
    assert "saga_router_move_saved_seconds_total 3.0" in metrics
    assert "saga_router_move_cost_seconds_total 0.5" in metrics


async def test_a_call_whose_answer_has_begun_stays():
    placer = Mover()
    source = Engine(answer_pieces([b"data: 1\n\n", b"data: 2\n\n"], pause=0.3))
    target = Engine()
    async with fleet(source, target, placer=placer) as client:
        waiting = asyncio.create_task(client.chat(X_Session_ID="s"))
        await until(lambda: bool(placer.begun))
        placer.move(source, target)
        reply = await waiting
    assert reply.body == b"data: 1\n\ndata: 2\n\n"
    assert not target.seen


async def test_a_response_that_has_only_been_announced_can_be_moved():
    announced = (
        b'event: response.created\ndata: {"type":"response.created"}\n\n'
        b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n'
    )
    answer = b'event: response.output_text.delta\ndata: {"delta":"x"}\n\n'

    async def answer_held(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(announced)
        await asyncio.Event().wait()
        return response

    placer = Mover()
    source, target = Engine(answer_held), Engine(answer_pieces([announced, answer], pause=0.05))
    async with fleet(source, target, placer=placer) as client:
        body = b'{"input": "x", "stream": true}'
        waiting = asyncio.create_task(client.post("/v1/responses", body))
        await until(lambda: len(source.seen) == 1)
        await asyncio.sleep(0.1)
        placer.move(source, target)
        reply = await waiting
    assert reply.body == announced + answer


async def test_a_stream_cannot_be_moved_and_the_placer_knows():
    placer, held = Mover(), Held()
    source, target = Engine(held), Engine()
    async with fleet(source, target, placer=placer, max_json=10) as client:
        body = b'{"prompt": "longer than ten bytes"}'
        waiting = asyncio.create_task(client.post("/v1/completions", body, X_Session_ID="s"))
        await until(lambda: len(source.seen) == 1)
        assert placer.begun == [placer.placed[0].call_id]
        placer.move(source, target)
        await until(lambda: not placer.moves)
        held.go.set()
        assert (await waiting).body == b"data: done\n\n"
    assert not target.seen


async def test_a_move_to_an_engine_that_is_gone_ends_where_there_is_one():
    placer, held = Mover(), Held()
    source, target, third = Engine(held), Engine(), Engine()
    async with fleet(source, target, third, placer=placer, health_interval=30.0) as client:
        waiting = asyncio.create_task(client.chat(X_Session_ID="s"))
        await until(lambda: len(source.seen) == 1)
        await target.stop()
        source.answer = answer_chat
        placer.move(source, target)
        assert (await waiting).headers["x-saga-backend"] == source.name


async def test_a_client_that_leaves_while_its_call_moves_leaves_nothing_behind():
    placer, held = Mover(), Held()
    source, target = Engine(held), Engine(held)
    async with fleet(source, target, placer=placer) as client:
        waiting = asyncio.create_task(client.chat(X_Session_ID="s"))
        await until(lambda: len(source.seen) == 1)
        placer.move(source, target)
        await until(lambda: not placer.moves)
        waiting.cancel()
        await until(lambda: len(client.router.proxy) == 0)
        await until(lambda: all(seen.aborted for seen in source.seen + target.seen))
        assert all(b.in_flight == 0 for b in client.router.backends)


class Broken(Mover):
    def place(self, arrival: Arrival, now: float, exclude: Collection[str] = ()) -> Decision | None:
        raise KeyError("a bug")

    def epoch(self, now: float) -> Sequence[Move]:
        raise ZeroDivisionError

    def on_finish(self, call_id: str, now: float, total_tokens: int | None) -> None:
        raise RuntimeError


async def test_a_bug_in_placement_costs_no_call():
    engines = Engine(), Engine()
    async with fleet(*engines, placer=Broken()) as client:
        replies = [await client.chat() for _ in range(3)]
        await asyncio.sleep(0.3)
        metrics = (await client.get("/metrics")).body.decode()
    assert [r.status for r in replies] == [200] * 3
    assert {r.headers["x-saga-decision"] for r in replies} == {"fallback"}
    errors = next(
        x for x in metrics.splitlines() if x.startswith("saga_router_policy_errors_total")
    )
    assert float(errors.split()[1]) >= 6 + 2
