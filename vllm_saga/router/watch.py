"""Watching the backends: are they up, and how are they?"""

from __future__ import annotations

import asyncio
import logging
import time
from urllib.parse import quote

import aiohttp
from yarl import URL

from vllm_saga.router import reports
from vllm_saga.router.backends import AddressError, Backend, Backends, BackendsFile
from vllm_saga.router.fleet import Placer, SessionKey
from vllm_saga.router.settings import RouterSettings

logger = logging.getLogger(__name__)

_FILE_INTERVAL = 1.0
_GONE_WITHIN = 3.0
_ASK_SAGA_AGAIN = 60.0


class Watcher:
    """Probes each backend and fetches its reports, as long as it is there."""

    def __init__(
        self,
        settings: RouterSettings,
        http: aiohttp.ClientSession,
        placer: Placer,
        backends: Backends,
    ) -> None:
        self._settings = settings
        self._http = http
        self._placer = placer
        self._tasks: dict[Backend, list[asyncio.Task[None]]] = {}
        self._wake: dict[Backend, asyncio.Event] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._backends = backends
        backends.started = self.start
        backends.stopped = self.stop

    def start(self, backend: Backend) -> None:
        self._wake[backend] = asyncio.Event()
        self._tasks[backend] = [
            asyncio.create_task(work) for work in (self._probe(backend), self._report(backend))
        ]

    def stop(self, backend: Backend) -> None:
        for task in self._tasks.pop(backend, ()):
            task.cancel()
        self._wake.pop(backend, None)

    def stop_all(self) -> None:
        for backend in tuple(self._tasks):
            self.stop(backend)
        for errand in self._errands:
            errand.cancel()

    def suspect(self, backend: Backend) -> None:
        """A call has failed there: probe it now."""
        if wake := self._wake.get(backend):
            wake.set()

    async def is_gone(self, backend: Backend) -> bool:
        """Whether nobody listens there any more, so that no call can still be running."""
        end = time.monotonic() + _GONE_WITHIN
        while True:
            found, refused = await self._ask(backend, 1.0)
            if found or refused or time.monotonic() > end:
                return refused
            await asyncio.sleep(0.1)

    def end_session(self, backend: Backend, session: SessionKey) -> None:
        """Tell an engine that a session is over; if that fails, it finds out by itself."""
        if backend.speaks_saga:
            task = asyncio.create_task(self._end_session(backend, session))
            self._errands.add(task)
            task.add_done_callback(self._errands.discard)

    async def _end_session(self, backend: Backend, session: SessionKey) -> None:
        tenant, name = session
        path = f"/v1/saga/sessions/{quote(name, safe='')}/end"
        headers = {**backend.headers, self._settings.tenant_header: tenant}
        timeout = aiohttp.ClientTimeout(total=self._settings.health_timeout)
        try:
            async with self._http.post(
                URL(backend.address.url + path, encoded=True), headers=headers, timeout=timeout
            ):
                pass
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            logger.debug("%s was not told of an ended session: %s", backend.name, error)

    async def _probe(self, backend: Backend) -> None:
        settings, wake = self._settings, self._wake[backend]
        while True:
            wake.clear()
            was = backend.health.up
            backend.health.probed(*await self._ask(backend, settings.health_timeout))
            if backend.health.up != was:
                logger.info("backend %s is %s", backend.name, "down" if was else "up")
                backend.speaks_saga = backend.report = None
            self._backends.refresh(backend, time.monotonic())
            try:
                async with asyncio.timeout(settings.health_interval):
                    await wake.wait()
                    # Calls that fail all the time must not turn into as many probes.
                    await asyncio.sleep(min(0.1, settings.health_interval / 2))
            except TimeoutError:
                pass

    async def _ask(self, backend: Backend, timeout: float) -> tuple[bool, bool]:
        """(it is up, nobody listens there)"""
        url = backend.address.url + self._settings.health_path
        try:
            async with self._http.get(
                url, headers=backend.headers, timeout=aiohttp.ClientTimeout(total=timeout)
            ) as response:
                return response.status == 200, False
        except aiohttp.ClientConnectorError as error:
            return False, isinstance(error.os_error, ConnectionRefusedError)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return False, False

    async def _report(self, backend: Backend) -> None:
        asked = time.monotonic()
        while True:
            await asyncio.sleep(self._settings.report_interval)
            if not backend.health.up:
                continue
            now = time.monotonic()
            if backend.speaks_saga is False and now - asked > _ASK_SAGA_AGAIN:
                backend.speaks_saga, asked = None, now
            try:
                async with asyncio.timeout(self._settings.health_timeout):
                    backend.report = await reports.fetch(self._http, backend, now)
            except (reports.ReportError, aiohttp.ClientError, TimeoutError, OSError) as error:
                logger.debug("no report of %s: %s", backend.name, error)
                continue
            self._placer.on_report(backend.name, backend.report)


async def follow(file: BackendsFile, backends: Backends) -> None:
    """Keep the backends as the file says; while it cannot be read they stay as they are."""
    error: str | None = None
    while True:
        try:
            if file.update(backends):
                names = ", ".join(b.name for b in backends) or "none"
                logger.info("%s has been read; backends: %s", file.path, names)
            error = None
        except (AddressError, OSError, UnicodeDecodeError) as problem:
            if str(problem) != error:
                error = str(problem)
                logger.error("%s: %s; backends stay as they are", file.path, error)
        await asyncio.sleep(_FILE_INTERVAL)
