"""What an engine says of itself: saga's state, or what stock vLLM's metrics tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec

from vllm_saga.policy.undecodable import UNDECODABLE
from vllm_saga.router.backends import Backend
from vllm_saga.router.fleet import MOST, EngineReport

_MAX_BYTES = 16 << 20


class ReportError(Exception):
    """An engine has said nothing that can be used."""


def parse_state(data: bytes, at: float) -> EngineReport:
    """Read the answer of `GET /v1/saga/state`.

    Raises:
        ReportError: it is something else.
    """
    try:
        return EngineReport.from_state(msgspec.json.decode(data, type=dict[str, Any]), at)
    except UNDECODABLE as error:
        raise ReportError(f"/v1/saga/state: {error}") from None


_SAMPLE = re.compile(
    r"^(vllm:num_requests_running|vllm:num_requests_waiting|vllm:kv_cache_usage_perc"
    r"|vllm:cache_config_info|process_start_time_seconds)(?:\{(.*)\})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


def parse_metrics(text: str, rank: int | None, at: float) -> EngineReport:
    """Read stock vLLM's `/metrics`: of the engine with this rank, or of all of them together.

    Raises:
        ReportError: they are of something else.
    """
    running = waiting = kv_tokens = 0
    used = 0.0
    started = ""
    usage: dict[str, float] = {}
    pools: dict[str, int] = {}
    for name, labels, value in _samples(text):
        engine = labels.get("engine", "0")
        if name == "process_start_time_seconds":
            started = str(value)
        elif name == "vllm:cache_config_info":
            pools[engine] = _pool(labels)
        elif rank is not None and engine != str(rank):
            continue
        elif name == "vllm:num_requests_running":
            running += int(value)
        elif name == "vllm:num_requests_waiting":
            waiting += int(value)
        else:
            usage[engine] = value
    if not usage:
        raise ReportError("/metrics: not those of a vLLM engine")
    for engine, share in usage.items():
        # Some versions tell the pool of one engine only; all are alike.
        pool = pools.get(engine) or max(pools.values(), default=0)
        kv_tokens += pool
        used += share * pool
    return EngineReport(at, started, kv_tokens, round(used), running, waiting)


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for name, labels, value in _SAMPLE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if 0.0 <= number <= MOST:
            yield name, dict(_LABEL.findall(labels)), number


def _pool(labels: dict[str, str]) -> int:
    try:
        pool = int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    except (KeyError, ValueError):
        return 0
    return pool if 0 <= pool <= MOST else 0


async def fetch(http: aiohttp.ClientSession, backend: Backend, at: float) -> EngineReport:
    """Ask an engine how it is: for saga's state, or if it has none for its metrics.

    Raises:
        ReportError: it answers neither.
        aiohttp.ClientError, TimeoutError: it cannot be reached.
    """
    if backend.speaks_saga is not False:
        status, data = await _get(http, backend, "/v1/saga/state")
        if status == 200:
            backend.speaks_saga = True
            return parse_state(data, at)
        if status in (404, 405):
            backend.speaks_saga = False
        else:
            raise ReportError(f"/v1/saga/state: status {status}")
    status, data = await _get(http, backend, "/metrics")
    if status != 200:
        raise ReportError(f"/metrics: status {status}")
    return parse_metrics(data.decode("utf-8", "replace"), backend.address.rank, at)


async def _get(http: aiohttp.ClientSession, backend: Backend, path: str) -> tuple[int, bytes]:
    url = backend.address.url + path
    async with http.get(url, headers=backend.headers) as response:
        data = bytearray()
        async for piece in response.content.iter_any():
            data += piece
            if len(data) > _MAX_BYTES:
                raise ReportError(f"{path}: more than {_MAX_BYTES} bytes")
        return response.status, bytes(data)
