"""Agents of every kind that a server meets, and what became of their calls."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import aiohttp

_SYSTEM = list(range(20, 116))
_TENANTS = ("", "red", "green", "blue")
#: None of these may cost a request more than vLLM's own 400.
_MALFORMED: tuple[dict[str, Any], ...] = (
    {"vllm_xargs": {"saga_last": "perhaps", "saga_parent": 12}},
    {"vllm_xargs": {"agent_hint": "{" * 4000}},
    {"vllm_xargs": {"agent_hint": json.dumps({"deadline_s": -1, "next_tool": 7, "x": None})}},
    {"vllm_xargs": {"agent_hint": json.dumps({"cache_control": {"ttl": "9" * 40}})}},
    {"vllm_xargs": "not an object"},
    {"session_id": "x" * 200_000},
    {"cache_salt": "y" * 200_000},
    {"metadata": {"user_id": "{" + "[" * 3000}},
)


class Pace:
    """Lets so many calls a second begin."""

    def __init__(self, calls_per_s: float) -> None:
        self._interval_s = 1.0 / calls_per_s
        self._next = 0.0

    async def turn(self) -> None:
        now = asyncio.get_running_loop().time()
        self._next = max(self._next + self._interval_s, now)
        await asyncio.sleep(self._next - now)


class Caller:
    """Makes the calls, and counts what became of them.

    counts: `begun` calls, of which `answered` (200, whole), `aborted` (by us, mid-stream) and
    `refused` (400); `failed` is everything else. `hinted` are calls with a hint that is right;
    `ended` sessions that the server says it has ended, `last` calls that said they were the last.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, pace: Pace) -> None:
        self._http, self._url, self._pace = http, url, pace
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []

    async def call(
        self,
        prompt: list[int],
        tokens: int,
        session: str | None = None,
        tenant: str = "",
        abort: bool = False,
        **body: Any,
    ) -> list[int]:
        """The tokens generated; none where the call was aborted, refused, or has failed."""
        await self._pace.turn()
        request = {
            "model": "model", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True,
            "temperature": 0.0, "return_token_ids": True, "stream": abort, **body,
        }  # fmt: skip
        headers = _headers(tenant) | ({"X-Session-ID": session} if session else {})
        self.counts["begun"] += 1
        try:
            async with self._http.post(
                f"{self._url}/v1/completions", json=request, headers=headers
            ) as answer:
                if abort and answer.status == 200:
                    await answer.content.readany()
                    answer.close()
                    self.counts["aborted"] += 1
                    return []
                told = await answer.read()
                if answer.status != 200:
                    self._refused(answer.status, told)
                    return []
                self.counts["answered"] += 1
                found: list[int] = json.loads(told)["choices"][0]["token_ids"]
                return found
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            self._fail(repr(error))
            return []

    async def end(self, session: str, tenant: str = "") -> None:
        url = f"{self._url}/v1/saga/sessions/{quote(session, safe='')}/end"
        try:
            async with self._http.post(url, headers=_headers(tenant)) as answer:
                told = await answer.json()
                self.counts["ended"] += bool(told.get("ended") or told.get("known"))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._fail(repr(error))

    def _refused(self, status: int, told: bytes) -> None:
        if status == 400:
            self.counts["refused"] += 1
        else:
            self._fail(f"HTTP {status}: {told[:200]!r}")

    def _fail(self, what: str) -> None:
        self.counts["failed"] += 1
        if len(self.errors) < 100:
            self.errors.append(what)


def _headers(tenant: str) -> dict[str, str]:
    """As a gateway would send them: a tenant in every request."""
    return {"x-tenant-id": tenant}


class Agents:
    """Agents that come one after the other in `lanes` lanes until `stop`."""

    def __init__(self, caller: Caller, seed: int) -> None:
        self._caller = caller
        self._random = random.Random(seed)
        self._number = 0
        self.kinds: Counter[str] = Counter()
        self._kinds: dict[str, Callable[[str, str], Awaitable[None]]] = {
            "linear": self._linear, "compacting": self._compacting, "sub_agents": self._sub_agents,
            "burst": self._burst, "aborting": self._aborting, "malformed": self._malformed,
            "nameless": self._nameless,
        }  # fmt: skip
        self._weights = (5, 3, 3, 2, 3, 2, 2)

    async def run(self, lanes: int, stop: asyncio.Event) -> None:
        async def lane() -> None:
            while not stop.is_set():
                await self._one()

        await asyncio.gather(*(lane() for _ in range(lanes)))

    async def _one(self) -> None:
        (kind,) = self._random.choices(list(self._kinds), self._weights)
        self._number += 1
        self.kinds[kind] += 1
        await self._kinds[kind](f"{kind}-{self._number}", self._random.choice(_TENANTS))

    def _new(self, length: int) -> list[int]:
        return [self._random.randrange(20, 400) for _ in range(length)]

    async def _gap(self) -> None:
        await asyncio.sleep(min(self._random.expovariate(2.0), 4.0))

    async def _leave(self, session: str, tenant: str, prompt: list[int]) -> None:
        """A session ends in one of the ways: it says so, its last call does, or nobody does."""
        how = self._random.randrange(3)
        if how == 0:
            await self._caller.end(session, tenant)
        elif how == 1:
            await self._last(session, tenant, prompt)

    async def _last(self, session: str, tenant: str, prompt: list[int], **xargs: Any) -> None:
        extra = {"saga_last": 1, **xargs}
        if await self._caller.call(prompt, 4, session, tenant, vllm_xargs=extra):
            self._caller.counts["last"] += 1

    async def _linear(self, session: str, tenant: str) -> None:
        prompt = [*_SYSTEM, *self._new(200)]
        turns = self._random.randrange(3, 9)
        for left in reversed(range(turns)):
            hint = {"expected_gap_s": 0.5, "steps_left": left, "next_tool": "bash"}
            xargs = {"agent_hint": json.dumps(hint)}
            self._caller.counts["hinted"] += 1
            prompt += await self._caller.call(prompt, 12, session, tenant, vllm_xargs=xargs)
            prompt += self._new(60)
            await self._gap()
        await self._leave(session, tenant, prompt)

    async def _compacting(self, session: str, tenant: str) -> None:
        prompt = [*_SYSTEM, *self._new(300)]
        for _ in range(2):
            for _ in range(3):
                prompt += await self._caller.call(prompt, 12, session, tenant)
                prompt += self._new(150)
                await self._gap()
            prompt = [*_SYSTEM, *self._new(80)]
        await self._leave(session, tenant, prompt)

    async def _sub_agents(self, session: str, tenant: str) -> None:
        prompt = [*_SYSTEM, *self._new(200)]
        prompt += await self._caller.call(prompt, 12, session, tenant)

        async def child(name: str) -> None:
            own = [*_SYSTEM[:64], *self._new(120)]
            for _ in range(2):
                xargs = {"saga_parent": session}
                own += await self._caller.call(own, 8, name, tenant, vllm_xargs=xargs)
                own += self._new(40)
            await self._last(name, tenant, own, saga_parent=session)

        await asyncio.gather(*(child(f"{session}.{n}") for n in range(2)))
        prompt += await self._caller.call([*prompt, *self._new(60)], 12, session, tenant)
        await self._leave(session, tenant, prompt)

    async def _burst(self, session: str, tenant: str) -> None:
        calls = (
            self._caller.call([*_SYSTEM, *self._new(150)], 8, f"{session}.{n}", tenant or "burst")
            for n in range(6)
        )
        await asyncio.gather(*calls)

    async def _aborting(self, session: str, tenant: str) -> None:
        prompt = [*_SYSTEM, *self._new(250)]
        await self._caller.call(prompt, 200, session, tenant, abort=True)
        await self._gap()
        prompt += await self._caller.call([*prompt, *self._new(30)], 8, session, tenant)
        await self._leave(session, tenant, prompt)

    async def _malformed(self, session: str, tenant: str) -> None:
        body = self._random.choice(_MALFORMED)
        await self._caller.call([*_SYSTEM, *self._new(40)], 4, None, tenant, **body)

    async def _nameless(self, session: str, tenant: str) -> None:
        prompt = [*_SYSTEM, *self._new(200)]
        for _ in range(4):
            prompt += await self._caller.call(prompt, 12, None, tenant)
            prompt += self._new(60)
            await self._gap()
