"""Request bodies: kept in memory where they tell who calls, else passed on as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from vllm_saga.policy.clients import read_odd
from vllm_saga.policy.undecodable import UNDECODABLE

PIECE = 256 * 1024
"""Large bodies are sent in pieces of this size, so that one cannot block the others."""


class BodyTimeout(Exception):
    """A client has not sent its body in time."""


class Budget:
    """How many bytes all bodies that are kept may have together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        if self.used + size > self._limit:
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        self.used -= size


class Body:
    """What a request carries: bytes that can be sent again, then perhaps a stream that cannot."""

    def __init__(
        self, kept: bytes, rest: AsyncIterator[bytes] | None, budget: Budget, budgeted: int = 0
    ) -> None:
        self._kept = kept
        self._rest = rest
        self._budget = budget
        self._budgeted = budgeted
        self._started = False
        self.timed_out = False

    @property
    def whole(self) -> bool:
        """Whether all of it is in memory."""
        return self._rest is None

    @property
    def can_send(self) -> bool:
        """A stream can be sent once."""
        return self._rest is None or not self._started

    def decode(self) -> dict[str, object] | None:
        """Its JSON object; None where it is none, which is for the engine to complain of."""
        if not self.whole or not self._kept:
            return None
        try:
            found = msgspec.json.decode(self._kept)
        except UNDECODABLE:
            return read_odd(self._kept)
        return found if isinstance(found, dict) else None

    def payload(self) -> bytes | AsyncIterator[bytes] | None:
        """What to send."""
        if self._rest is not None:
            return self._stream()
        return self._pieces() if len(self._kept) > PIECE else self._kept or None

    def forget(self) -> None:
        """It will not be sent again."""
        self._budget.give(self._budgeted)
        self._budgeted = 0
        self._kept = b""

    async def _pieces(self) -> AsyncIterator[bytes]:
        kept = memoryview(self._kept)
        for start in range(0, len(kept), PIECE):
            yield kept[start : start + PIECE]  # type: ignore[misc]

    async def _stream(self) -> AsyncIterator[bytes]:
        assert self._rest is not None
        self._started = True
        if self._kept:
            yield self._kept
        try:
            async for piece in self._rest:
                yield piece
        except BodyTimeout:
            self.timed_out = True
            raise


async def read_body(
    request: web.BaseRequest, budget: Budget, max_json: int, timeout: float
) -> Body:
    """Keep the body if it is JSON, no longer than `max_json` and within the budget, or stream it.

    Raises:
        BodyTimeout: a body to be kept was not there after `timeout` seconds.
    """
    if not request.body_exists:
        return Body(b"", None, budget)
    length = request.content_length
    readable = "json" in request.content_type and "Content-Encoding" not in request.headers
    if not readable or (length or 0) > max_json:
        return Body(b"", _stream(request, timeout), budget)
    kept: list[bytes] = []
    size = taken = 0
    try:
        async with asyncio.timeout(timeout):
            while piece := await request.content.readany():
                kept.append(piece)
                size += len(piece)
                if size > max_json or not budget.take(len(piece)):
                    rest = _stream(request, timeout)
                    return Body(b"".join(kept), rest, budget, taken)
                taken += len(piece)
    except BaseException as error:
        budget.give(taken)
        if isinstance(error, TimeoutError):
            raise BodyTimeout from None
        raise
    return Body(b"".join(kept), None, budget, taken)


async def _stream(request: web.BaseRequest, timeout: float) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(timeout):
                piece = await request.content.readany()
        except TimeoutError:
            raise BodyTimeout from None
        if not piece:
            return
        yield piece
