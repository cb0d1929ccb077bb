"""From a request to its answer: chosen, sent, perhaps sent elsewhere, and passed back as it is."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from vllm_saga.policy.identity import session_key
from vllm_saga.policy.messages import read_response_id
from vllm_saga.router import headers, websockets
from vllm_saga.router.backends import Backend, Backends
from vllm_saga.router.bodies import Body, BodyTimeout, Budget, read_body
from vllm_saga.router.calls import Answer, BrokenAnswer, Call, Refused, is_preamble
from vllm_saga.router.edge import Edge
from vllm_saga.router.fleet import Decision, Move, Placer, SessionKey
from vllm_saga.router.journal import Journal
from vllm_saga.router.metrics import Metrics
from vllm_saga.router.problems import Problem
from vllm_saga.router.settings import RouterSettings
from vllm_saga.router.stored import StoredResponses
from vllm_saga.router.usage import Usage
from vllm_saga.router.watch import Watcher

logger = logging.getLogger(__name__)

_SMALL = 32 * 1024
_RESPONSE_PATH = re.compile(r"/v1/responses/([^/]+)(?:/.*)?")


class Proxy:
    """Serves every request that is not for the router itself."""

    def __init__(
        self,
        settings: RouterSettings,
        http: aiohttp.ClientSession,
        backends: Backends,
        placer: Placer,
        watcher: Watcher,
        edge: Edge,
        journal: Journal,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._http = http
        self._backends = backends
        self._placer = placer
        self._watcher = watcher
        self._edge = edge
        self._journal = journal
        self._metrics = metrics
        self._calls: dict[str, Call] = {}
        self._numbers = itertools.count(1)
        self._stored = StoredResponses(settings.max_sessions)
        self.budget = Budget(settings.max_buffered)
        self._backend_key = settings.backend_api_key or settings.api_key

    def __len__(self) -> int:
        return len(self._calls)

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Pass a request on and its answer back.

        Raises:
            Problem: no backend has answered it.
        """
        received = time.monotonic()
        self._check_room()
        await _continue(request)
        try:
            body = await read_body(
                request, self.budget, self._settings.max_json, self._settings.body_timeout
            )
        except BodyTimeout:
            raise Problem(408, "body_timeout", "the request's body did not come in time") from None
        try:
            self._check_room()
            call = self._recognise(request, body, received)
        except BaseException:
            body.forget()
            raise
        self._calls[call.id] = call
        total: int | None = None
        try:
            if websockets.is_websocket(request):
                return await self._serve_websocket(call)
            answer = await self._begin(call)
            response, total = await self._relay(call, answer)
            return response
        finally:
            self._finish(call, total)

    def carry_out(self, move: Move) -> None:
        """A session has a new home: take back those of its calls that have not begun."""
        self._journal.moved(move)
        self._metrics.moves.labels(move.reason).inc()
        self._metrics.move_cost.inc(move.cost_s)
        self._metrics.move_saved.inc(max(move.saved_s, 0.0))
        for call_id in move.call_ids:
            call = self._calls.get(call_id)
            if call is not None and call.withdraw(move.target, move.reason):
                self._metrics.withdrawn.inc()

    def end_session(self, request: web.BaseRequest, name: str) -> bool:
        """A client says that a session of its tenant is over; whether it was known."""
        session = session_key(self._edge.tenant(request.headers), name)
        self._placer.end(session)
        for backend in self._backends:
            self._watcher.end_session(backend, session)
        return self._forget(session)

    # -- choosing -------------------------------------------------------------------------------

    def _check_room(self) -> None:
        if len(self._calls) >= self._settings.max_in_flight:
            raise Problem(429, "router_full", "too many requests are being served", 1)

    def _recognise(self, request: web.BaseRequest, body: Body, received: float) -> Call:
        decoded = body.decode()
        number = f"c{next(self._numbers)}"
        recognised = self._edge.recognise(number, request.path, request.headers, decoded, received)
        self._metrics.identity.labels(recognised.source).inc()
        named = _RESPONSE_PATH.fullmatch(request.path)
        stored = named[1] if named else decoded.get("previous_response_id") if decoded else None
        pinned = self._stored.where(stored) if isinstance(stored, str) else None
        if pinned is not None and self._backends.get(pinned) is None:
            pinned = None
        return Call(request, body, recognised, received, pinned)

    def _choose(self, call: Call, refused: set[str]) -> Backend | None:
        """The backend to send to; it counts the call as in flight there. None if there is none."""
        while True:
            decision = self._decide(call, refused)
            backend = self._backends.get(decision.replica) if decision else None
            if decision is None:
                return None
            if backend is None or backend.in_flight >= self._settings.max_per_backend:
                refused.add(decision.replica)
                continue
            call.switch(backend)
            call.decision = decision.reason
            self._metrics.decisions.labels(decision.reason).inc()
            return backend

    def _decide(self, call: Call, refused: set[str]) -> Decision | None:
        if call.target is not None:
            (target, reason), call.target = call.target, None
            backend = self._backends.get(target)
            if backend is not None and backend.accepting and target not in refused:
                return Decision(target, reason)
        exclude = set(refused)
        if call.pinned is not None:
            exclude.update(b.name for b in self._backends if b.name != call.pinned)
        arrival, now = call.recognised.arrival, time.monotonic()
        decision = self._placer.place(arrival, now, exclude)
        if decision is not None:
            source = call.recognised.source
            self._journal.placed(call.id, arrival.session, source, decision, now)
            if not call.movable:
                self._placer.on_first_byte(call.id, now)
        return decision

    # -- asking ---------------------------------------------------------------------------------

    async def _begin(self, call: Call) -> Answer:
        """Send the call until a backend answers it.

        It is sent again only where it cannot have been executed: nothing was reached, the backend
        said 503, it has died since, or a move took the call back.

        Raises:
            Problem: nobody has answered.
        """
        refused: set[str] = set()
        last: Answer | None = None
        while True:
            backend = self._choose(call, refused)
            if backend is None:
                return last or self._nobody(refused)
            if call.asking is None:
                self._metrics.choosing.observe(time.monotonic() - call.received)
            try:
                answer = await self._attempt(call, backend)
            except Refused as error:
                refused.add(backend.name)
                last = error.answer
                if len(refused) > self._settings.retries or not call.body.can_send:
                    return last or self._nobody(refused)
                self._metrics.retries.labels(error.cause).inc()
                continue
            if answer is not None:
                return answer

    def _nobody(self, refused: set[str]) -> Answer:
        full = [b for b in self._backends if b.in_flight >= self._settings.max_per_backend]
        if full:
            raise Problem(429, "backends_full", "every backend that may serve this is full", 1)
        if refused:
            raise Problem(503, "backends_failed", "no backend could be reached", 2)
        raise Problem(503, "no_backend", "no backend accepts requests", 2)

    async def _attempt(self, call: Call, backend: Backend) -> Answer | None:
        """Ask one backend; None if a move has taken the call back.

        Raises:
            Refused: the call was not executed there, and another backend may be asked.
            Problem: it may have been.
        """
        call.asking = asyncio.create_task(self._ask(call, backend))
        try:
            answer = await call.asking
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call.target is None or (task is not None and task.cancelling()):
                raise
            return None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            self._failed(backend)
            raise Refused("connect") from None
        except aiohttp.SocketTimeoutError:
            self._failed(backend)
            raise Problem(504, "answer_timeout", f"{backend.name} has not answered") from None
        except (aiohttp.InvalidURL, ValueError) as error:
            raise Problem(400, "bad_request", f"this cannot be sent on: {error}") from None
        except (aiohttp.ClientError, OSError, TimeoutError, BodyTimeout):
            if call.body.timed_out:
                raise Problem(408, "body_timeout", "the body did not come in time") from None
            self._failed(backend)
            if await self._watcher.is_gone(backend):
                raise Refused("died") from None
            message = f"{backend.name} has broken off before it answered"
            raise Problem(502, "backend_broke_off", message) from None
        if answer.response.status == 503:
            raise Refused("503", answer)
        backend.health.call_succeeded()
        return answer

    async def _ask(self, call: Call, backend: Backend) -> Answer:
        """Send the call and wait for the first bytes of its answer.

        vLLM sends the headers of a stream at once, even if it then holds the call back; only bytes
        tell that the answer has begun.
        """
        request = call.request
        response = await self._http.request(
            request.method,
            call.url_at(backend),
            headers=self._passing(call, backend),
            data=call.body.payload(),
            allow_redirects=False,
        )
        try:
            first = await response.content.readany()
            if response.content_type == "text/event-stream" and request.path.endswith("/responses"):
                while is_preamble(first) and (piece := await response.content.readany()):
                    first += piece
        except BaseException:
            response.close()
            raise
        if response.status != 503:
            call.begun = True
            self._placer.on_first_byte(call.id, time.monotonic())
        return Answer(backend, response, first)

    def _passing(self, call: Call, backend: Backend) -> CIMultiDict[str]:
        return headers.for_backend(
            call.request.headers, backend.headers, call.recognised.forward, self._backend_key
        )

    def _failed(self, backend: Backend) -> None:
        now = time.monotonic()
        backend.health.call_failed(now)
        self._backends.refresh(backend, now)
        self._watcher.suspect(backend)

    # -- answering ------------------------------------------------------------------------------

    async def _relay(self, call: Call, answer: Answer) -> tuple[web.StreamResponse, int | None]:
        """Pass the answer back; also how many tokens the call's context now holds, if known."""
        call.body.forget()
        call.begun = True
        source, request = answer.response, call.request
        self._metrics.first_byte.observe(time.monotonic() - call.received)
        self._remember(call, answer)
        arrival = call.recognised.arrival
        session = arrival.session[1] if arrival.session else None
        out = web.StreamResponse(
            status=source.status,
            reason=source.reason,
            headers=headers.for_client(source.headers, answer.backend.name, call.decision, session),
        )
        if source.status == 503:
            out.headers.setdefault("Retry-After", "1")
        usage = Usage(arrival.prompt_tokens, "Content-Encoding" not in source.headers)
        try:
            await out.prepare(request)
            piece = answer.first
            while piece:
                await self._write(request, out, piece)
                usage.feed(piece)
                piece = await answer.next_piece()
            await out.write_eof()
        except (ConnectionResetError, TimeoutError):
            logger.debug("%s: the client has gone, or takes nothing", call.id)
            _cut(request)
            return out, None
        except BrokenAnswer:
            self._failed(answer.backend)
            logger.warning("%s broke off in the middle of an answer", answer.backend.name)
            _cut(request)
            return out, None
        return out, usage.total_tokens() if source.status < 400 else None

    async def _write(self, request: web.BaseRequest, out: web.StreamResponse, piece: bytes) -> None:
        transport = request.transport
        # Small pieces cannot block while nothing waits to be sent: that is nearly always so.
        if len(piece) < _SMALL and transport and not transport.get_write_buffer_size():
            await out.write(piece)
            return
        async with asyncio.timeout(self._settings.write_timeout):
            await out.write(piece)

    def _remember(self, call: Call, answer: Answer) -> None:
        """A stored response is only where it was made."""
        if call.request.method == "POST" and call.request.path.endswith("/responses"):
            response_id = read_response_id(answer.first[:4096])
            if response_id is not None:
                self._stored.add(response_id, answer.backend.name)
                self._edge.note_response(response_id, call.recognised.arrival, call.received)

    def _finish(self, call: Call, total_tokens: int | None) -> None:
        del self._calls[call.id]
        backend = call.backend
        call.close()
        arrival, now = call.recognised.arrival, time.monotonic()
        self._placer.on_finish(call.id, now, total_tokens)
        self._journal.finished(arrival.session, total_tokens, now)
        if arrival.last and arrival.session is not None:
            self._forget(arrival.session)
            if backend is not None and call.recognised.forward is not None:
                self._watcher.end_session(backend, arrival.session)

    def _forget(self, session: SessionKey) -> bool:
        """It is over; whether it was known."""
        self._edge.forget(session)
        return self._journal.ended(session)

    async def _serve_websocket(self, call: Call) -> web.StreamResponse:
        refused: set[str] = set()
        while backend := self._choose(call, refused):
            passing = headers.for_websocket(self._passing(call, backend))
            try:
                socket = await websockets.connect(
                    self._http, str(call.url_at(backend)), passing, call.request
                )
            except aiohttp.WSServerHandshakeError as error:
                raise Problem(error.status, "websocket_refused", error.message) from None
            except (aiohttp.ClientError, TimeoutError, OSError):
                self._failed(backend)
                refused.add(backend.name)
                continue
            self._placer.on_first_byte(call.id, time.monotonic())
            call.begun = True
            own = {
                headers.BACKEND_HEADER: backend.name, headers.DECISION_HEADER: call.decision,
            }  # fmt: skip
            async with socket:
                return await websockets.relay(call.request, socket, own)
        raise Problem(503, "no_backend", "no backend could be reached", 2)


def _cut(request: web.BaseRequest) -> None:
    """End the connection, so that nobody takes what came for all of the answer."""
    if request.transport is not None:
        request.transport.close()


async def _continue(request: web.BaseRequest) -> None:
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
