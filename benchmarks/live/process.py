"""A process of the benchmark with its children and its log: started, watched, stopped whole."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

STOP_TIMEOUT_S = 15.0


class ServerError(RuntimeError):
    """A server or a router did not start, or died."""


class Process:
    """`command` in a process group of its own; `name` is what errors call it."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, env: Mapping[str, str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=dict(env), start_new_session=True,
            )  # fmt: skip

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
