"""One request on its way through the router."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

from vllm_saga.router.backends import Backend
from vllm_saga.router.bodies import Body
from vllm_saga.router.edge import Recognised

_ANNOUNCED = re.compile(rb"event: ?response\.(?:created|queued|in_progress)\n")
_MAX_PREAMBLE = 4 << 20


class Refused(Exception):
    """A backend has not taken a call, so that another may. `answer`: the 503 it gave, if it did."""

    def __init__(self, cause: str, answer: Answer | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.answer = answer


class BrokenAnswer(Exception):
    """A backend has broken off in the middle of its answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A backend's answer, read up to its first bytes."""

    backend: Backend
    response: aiohttp.ClientResponse
    first: bytes

    async def next_piece(self) -> bytes:
        """The bytes that have come since, empty at the end.

        Raises:
            BrokenAnswer: there is no end.
        """
        try:
            return await self.response.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError):
            raise BrokenAnswer from None


@dataclass(eq=False, slots=True)
class Call:
    """A request and where it is being served.

    pinned: the one backend that can serve it (it keeps the response that the request names).
    asking: the attempt of now. begun: its answer has begun, so that it stays where it is.
    target, reason: where a move wants it to go.
    """

    request: web.BaseRequest
    body: Body
    recognised: Recognised
    received: float
    pinned: str | None = None
    backend: Backend | None = None
    decision: str = ""
    asking: asyncio.Task[Answer] | None = field(default=None, repr=False)
    begun: bool = False
    target: tuple[str, str] | None = None

    @property
    def id(self) -> str:
        return self.recognised.arrival.call_id

    @property
    def movable(self) -> bool:
        return self.body.whole and self.pinned is None

    def url_at(self, backend: Backend) -> URL:
        """Where it is sent: its target to the letter, behind the backend's address."""
        target = self.request.raw_path
        if not target.startswith("/"):
            target = self.request.rel_url.raw_path_qs
        return URL(backend.address.url + target, encoded=True)

    def switch(self, backend: Backend | None) -> None:
        """It is in flight there now, and nowhere else."""
        if self.backend is not None:
            self.backend.in_flight -= 1
        self.backend = backend
        if backend is not None:
            backend.in_flight += 1

    def withdraw(self, target: str, reason: str) -> bool:
        """Take it back from where it waits and send it to `target`, unless its answer has begun."""
        if self.begun or not self.movable:
            return False
        self.target = (target, reason)
        if self.asking is not None:
            self.asking.cancel()
        return True

    def close(self) -> None:
        """Whatever of it still runs at a backend is aborted there."""
        self.switch(None)
        self.body.forget()
        if self.asking is None or self.asking.cancelled():
            return
        if not self.asking.done():
            self.asking.cancel()
        elif self.asking.exception() is None:
            self.asking.result().response.close()


def is_preamble(stream: bytes) -> bool:
    """Whether these are only the events that vLLM sends of a response before it is computed.

    While nothing else has come the call may be held back over there, and can still be moved.
    """
    if len(stream) >= _MAX_PREAMBLE or b"\r" in stream:
        return False
    *events, _ = stream.split(b"\n\n")
    return all(_ANNOUNCED.match(event) for event in events)
