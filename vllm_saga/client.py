"""Asks a vLLM server, or the router before some, for what it tells over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from vllm_saga.policy.undecodable import UNDECODABLE

_TIMEOUT_S = 10.0


class UnreachableError(Exception):
    """Nobody has answered; the message says who was asked, and what went wrong."""


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def values(self) -> dict[str, Any]:
        """The JSON object that was answered; empty if it was something else."""
        try:
            values: dict[str, Any] = msgspec.json.decode(self.body, type=dict[str, Any])
        except UNDECODABLE:
            return {}
        return values

    @property
    def error(self) -> str:
        """What is wrong, as far as the answer says it."""
        error = self.values().get("error")
        said = error.get("message") if isinstance(error, dict) else error
        return str(said or f"status {self.status}")


class Client:
    """`async with Client(url) as client`: GETs below `url`, with a key and headers if given.

    Raises:
        UnreachableError: `url` is none.
    """

    def __init__(
        self, url: str, api_key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.url = url.rstrip("/")
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise UnreachableError(f"{url!r} is no URL: http://host:port is wanted")
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = {**key, **(headers or {})}

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        self._http = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.close()

    async def get(self, path: str) -> Reply:
        """Raises UnreachableError if there is no answer."""
        try:
            async with self._http.get(self.url + path, allow_redirects=False) as answer:
                return Reply(answer.status, await answer.read())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise UnreachableError(f"{self.url} does not answer: {why}") from None
