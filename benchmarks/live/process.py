"""A server of the benchmark with its children and its log: started, watched, stopped whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import aiohttp
import psutil

STOP_TIMEOUT_S = 15.0


class ServerError(RuntimeError):
    """A server or a router did not start, or died."""


class Process:
    """`command` in a process group of its own, serving on `port`; `name` is what errors call it.

    `async with` starts it, waits until it serves, and always stops it.
    """

    def __init__(self, name: str, command: Sequence[str], port: int, log: Path) -> None:
        self.name = name
        self.command = list(command)
        self.port = port
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self.launch()
        try:
            await self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Start it, and do not wait."""
        raise NotImplementedError

    async def wait_until_ready(self) -> None:
        """Return when it serves. Raises `ServerError` if it does not."""
        raise NotImplementedError

    def start(self, env: Mapping[str, str]) -> None:
        """Raises OSError: `log` cannot be written, or there is no such program."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            # In our session: Linux shares cores between sessions first (autogroup), and the client
            # of a busy server of another session waits for up to a second.
            self._process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=dict(env), process_group=0,
            )  # fmt: skip

    async def ask_until_served(
        self, ask: Callable[[aiohttp.ClientSession], Awaitable[str | None]], within_s: float
    ) -> None:
        """Ask what is wrong until nothing is.

        Raises:
            ServerError: the process is gone, or something is wrong for too long.
        """
        deadline = time.monotonic() + within_s
        wrong: str | None = "no connection"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
            while time.monotonic() < deadline:
                self.check_alive()
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    wrong = await ask(http)
                    if wrong is None:
                        return
                await asyncio.sleep(0.25)
        raise ServerError(
            f"{self.name} did not serve within {within_s:.0f} s: {wrong}\nits log: {self.log}"
        )

    def cpu_s(self) -> float:
        """CPU seconds used so far by the process and all its children."""
        if self._process is None:
            return 0.0
        total = 0.0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def rss_bytes(self) -> dict[str, int]:
        """Resident memory of the process and each of its children now, by name and number."""
        found: dict[str, int] = {}
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._process.pid)
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        name = f"{process.name()} {process.pid}"
                        found[name] = process.memory_info().rss
        return found

    def check_alive(self) -> None:
        """Raise `ServerError` with the cause, as far as the log tells, if the process is gone."""
        if self._process is None or self._process.poll() is None:
            return
        lines = self.log.read_text(errors="replace").splitlines()
        errors = (line for line in lines if "Error: " in line and "WARNING" not in line)
        cause = next(errors, "\n".join(lines[-5:]))
        raise ServerError(
            f"{self.name} exited with {self._process.returncode}: {cause}\nits log: {self.log}"
        )

    def stop(self, first: signal.Signals = signal.SIGTERM) -> None:
        """Stop the process group: send `first`, kill what is left after `STOP_TIMEOUT_S`."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, first)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
