"""Starting, watching and stopping a real `vllm serve` on this machine's CPU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.live.process import Process, free_port

#: `vllm serve` on a loaded two-core machine needs 20-30 s; allow plenty.
START_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What both arms have in common. `blocks` and `block_size` fix the KV pool.

    `extra` and `env` are further flags and environment variables of `vllm serve`.
    """

    model: Path
    blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    stream_interval: int = 8
    extra: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, executable: Path, scheduler: str, port: int) -> list[str]:
        """The `vllm serve` command line of one arm; the arms differ in `--scheduler-cls` only."""
        flags: dict[str, str | int] = {
            "--served-model-name": "model",
            "--load-format": "dummy",
            "--host": "127.0.0.1",
            "--port": port,
            "--block-size": self.block_size,
            "--num-gpu-blocks-override": self.blocks,
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
            "--stream-interval": self.stream_interval,
        }
        command = [str(executable), "serve", str(self.model)]
        for flag, value in flags.items():
            command += [flag, str(value)]
        command += [
            "--enforce-eager",
            "--enable-prompt-tokens-details",
            "--disable-uvicorn-access-log",
            *self.extra,
        ]
        return command if scheduler == "stock" else [*command, "--scheduler-cls", scheduler]


def tiny_server(model: Path, blocks: int, *flags: str, **changes: Any) -> ServerOptions:
    """A server of a tiny model that two cores carry: short contexts, few calls in a step.

    `blocks` of 32 tokens are the KV pool; `flags` of `vllm serve` and `changes` of `ServerOptions`
    come on top.
    """
    usual: dict[str, Any] = {
        "block_size": 32,
        "max_model_len": 3072,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "extra": ("--dtype", "float32", *flags),
    }
    return ServerOptions(model=model, blocks=blocks, **usual | changes)


def worker_cores(replica: int = 0, replicas: int = 1) -> Sequence[int]:
    """Cores for the model's threads of one replica: as many for each, at most four.

    One core is left to HTTP and the client, if there are more than replicas.
    """
    cores = sorted(os.sched_getaffinity(0))
    usable = cores[1:] if len(cores) > replicas else cores
    each = min(4, len(usable) // replicas)
    if not each:
        return [usable[replica % len(usable)]]
    return usable[replica * each : (replica + 1) * each]


def environment(cores: Sequence[int], sockets: str) -> dict[str, str]:
    """Offline, silent, and with model threads bound so that they and the client do not fight.

    `sockets` is the directory for vLLM's own sockets, which it leaves behind.
    """
    return os.environ | {
        "VLLM_RPC_BASE_PATH": sockets,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_LOGGING_LEVEL": "INFO",
    }


class Server(Process):
    """A `vllm serve` process. `port`: where it listens; None = where there is room."""

    def __init__(
        self,
        options: ServerOptions,
        scheduler: str,
        log: Path,
        executable: Path,
        port: int | None = None,
    ) -> None:
        port = port or free_port()
        command = options.command(executable, scheduler, port)
        super().__init__(f"vllm serve ({scheduler})", command, port, log)
        self.scheduler = scheduler
        self._env = options.env
        self._sockets: str | None = None

    def launch(self) -> None:
        self._sockets = tempfile.mkdtemp(prefix="saga-")
        self.start(environment(worker_cores(), self._sockets) | dict(self._env))

    def stop(self, first: signal.Signals = signal.SIGTERM) -> None:
        super().stop(first)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)

    async def wait_until_ready(self) -> None:
        await self.ask_until_served(self._ask_health, START_TIMEOUT_S)

    async def _ask_health(self, http: aiohttp.ClientSession) -> str | None:
        async with http.get(f"{self.url}/health") as answer:
            return None if answer.status == 200 else f"HTTP {answer.status}"


_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)

COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}


def parse_metrics(text: str) -> dict[str, float]:
    """Sum of each metric over its labels, from the Prometheus text format."""
    totals: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals


async def scrape(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Current values of all metrics of the server."""
    async with http.get(f"{url}/metrics") as answer:
        return parse_metrics(await answer.text())


def counter_deltas(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int]:
    """Growth of the counters the report uses."""
    return {
        key: round(after.get(name, 0.0) - before.get(name, 0.0)) for key, name in COUNTERS.items()
    }
