"""The routers that can stand before the replicas: ours, and others' from PyPI.

Others' are installed when they are first wanted, each in a virtual environment of its own, without
the inference engines that they name as dependencies.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.live import environments
from benchmarks.live.process import Process, ServerError, free_port

START_TIMEOUT_S = 60.0
INSTALLED = environments.KEPT / "routers"


class RouterUnavailable(ServerError):
    """Another's router cannot be installed, or does not serve."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another's router: its release on PyPI, and how it is called."""

    package: str
    version: str
    subcommand: tuple[str, ...] = ()


PEERS = {
    peer.package: peer
    for peer in (Peer("vllm-router", "0.1.17"), Peer("sglang-router", "0.3.2", ("launch",)))
}
#: What their Python side imports.
_NEEDS = ("aiohttp", "fastapi", "orjson", "requests", "setproctitle", "uvicorn")


def find_peer(router: str) -> Peer | None:
    """Whose router `PACKAGE-POLICY` is; None if it is ours."""
    return next((p for name, p in PEERS.items() if router.startswith(f"{name}-")), None)


async def install(peer: Peer) -> Path:
    """Its executable, installed if it is not there yet.

    Raises:
        RouterUnavailable: pip did not manage.
    """
    venv = INSTALLED / f"{peer.package}-{peer.version}"
    try:
        made = await environments.make(
            venv, ("--no-deps", f"{peer.package}=={peer.version}"), _NEEDS
        )
    except environments.InstallFailed as error:
        raise RouterUnavailable(str(error)) from None
    return made / peer.package


async def command(router: str, backends: Sequence[str], port: int) -> list[str]:
    """The command line that starts `router` on `port`, before the servers at `backends`.

    Raises:
        RouterUnavailable: it cannot be installed.
    """
    peer = find_peer(router)
    place = ["--host", "127.0.0.1", "--port", str(port)]
    if peer is None:
        executable = Path(sys.executable).with_name("vllm-saga")
        listed = ["--backends", ",".join(backends)]
        return [str(executable), "router", "--policy", router, *place, *listed]
    policy = router.removeprefix(f"{peer.package}-")
    listed = ["--worker-urls", *backends, "--prometheus-port", str(free_port())]
    return [str(await install(peer)), *peer.subcommand, "--policy", policy, *place, *listed]


class Router(Process):
    """A running router."""

    def __init__(self, router: str, command: Sequence[str], port: int, log: Path) -> None:
        super().__init__(router, command, port, log)
        self._is_peer = find_peer(router) is not None

    def launch(self) -> None:
        self.start(os.environ)

    async def wait_until_ready(self) -> None:
        try:
            await self.ask_until_served(self._send_a_call, START_TIMEOUT_S)
        except ServerError as error:
            raise (RouterUnavailable(str(error)) if self._is_peer else error) from None

    async def _send_a_call(self, http: aiohttp.ClientSession) -> str | None:
        """What is wrong with the answer: some say they are healthy before they serve."""
        body = {"model": "model", "prompt": "hi", "max_tokens": 1}
        async with http.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status == 200:
                return None
            return f"HTTP {answer.status}: {(await answer.text())[:200]}"
