"""Fits the cost of an engine step to a running vLLM server, which needs no change for it.

Each finished call leaves in the server's /metrics what the engine core's own clock measured:
`request_prefill_time_seconds` (first scheduled to first token) and `request_decode_time_seconds`
(first to last token). So we send calls of known size, one probe at a time, read the growth of
those sums, work out which steps vLLM's scheduler makes of a probe, and find the coefficients with
which these steps add up to the seconds measured. The way over HTTP is in neither figure: it is what
calls take longer at the client, and grows with the streams that one API server has to write.

vLLM's per-step log (`--enable-logging-iteration-details`) is not used. It does not tell how long
the contexts are, and its time starts once the step has been handed to the model's worker: what
the step costs before that is missing, or counted to the step before.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from vllm_saga.simulator.fitting import FitReport, Sample, fit
from vllm_saga.simulator.hardware import Batch, Hardware

#: `vllm serve` on H100 and H200; on other GPUs vLLM's defaults are 2048 and 256.
MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS = 8192, 1024

#: Output tokens of a decode probe.
_OUTPUT = 64
#: How often a probe is repeated when somebody else's call finishes meanwhile.
_ATTEMPTS = 4
_METRICS_S, _IDLE_S, _CALL_S = 5.0, 30.0, 900.0

_PREFILL = "vllm:request_prefill_time_seconds_sum"
_DECODE = "vllm:request_decode_time_seconds_sum"
_QUEUE = "vllm:request_queue_time_seconds_sum"
#: Not a metric: mean seconds from sending a call to the end of its answer.
_CLIENT = "client_s"
_COMPUTED = "vllm:request_prefill_kv_computed_tokens_sum"
_FINISHED = "vllm:request_prefill_time_seconds_count"
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")

Progress = Callable[[int, int], None]


class CalibrationError(RuntimeError):
    """The server cannot be measured; the message says why and what to do."""


# -- probes -----------------------------------------------------------------------------------


class Probe(NamedTuple):
    """`calls` calls at once, each of `new` prompt tokens after `context` that are cached."""

    calls: int
    context: int
    new: int
    output: int

    @property
    def prompt(self) -> int:
        return self.context + self.new


def plan(
    kv_tokens: int, max_model_len: int, max_num_batched_tokens: int, max_num_seqs: int
) -> list[Probe]:
    """Probes that tell all coefficients apart on a server with these limits."""
    pool = kv_tokens * 8 // 10
    room = min(max_model_len - 1, pool)
    if room < 2 * _OUTPUT:
        raise CalibrationError(f"calls of at most {room} tokens are too short to measure anything")
    longest = min(room, 4 * max_num_batched_tokens)
    lengths = [16 << n for n in range(20) if 16 << n < longest]
    probes = [Probe(1, 0, length, 1) for length in [*lengths, longest]]
    context = longest * 3 // 4
    probes += [Probe(1, context, new, 1) for new in (64, 512) if context + new <= room]
    widest = min(max_num_seqs, max_num_batched_tokens, 64)
    for calls in sorted({*(4**n for n in range(4) if 4**n < widest), widest}):
        each = min(room, min(pool, 32 * max_num_batched_tokens) // calls) - _OUTPUT - 1
        contexts = {min(32, each), each // 3, each}
        probes += [Probe(calls, size, 1, _OUTPUT) for size in sorted(contexts) if size > 0]
    return probes


def steps(
    probe: Probe, cached: int, max_num_batched_tokens: int, max_num_seqs: int
) -> Iterator[tuple[Batch, int]]:
    """The engine steps of a probe whose calls find `cached` tokens each, as vLLM schedules them.

    First come, first served, at most so many tokens a step, prompts in chunks. With each step goes
    the number of its calls that have had their first token before.
    """
    done = [cached] * probe.calls
    total = probe.prompt + probe.output - 1
    while done[-1] < total:
        left = max_num_batched_tokens
        scheduled: list[tuple[int, int]] = []
        for index, computed in enumerate(done):
            if computed < total and left and len(scheduled) < max_num_seqs:
                count = min(max(probe.prompt - computed, 1), left)
                scheduled.append((index, count))
                left -= count
        decoding = sum(probe.prompt <= computed < total for computed in done)
        yield Batch.of((count, done[index]) for index, count in scheduled), decoding
        for index, count in scheduled:
            done[index] += count


def _samples(
    probe: Probe, grown: Mapping[str, float], max_num_batched_tokens: int, max_num_seqs: int
) -> list[Sample]:
    """Samples of one probe: its prefill if it was a single call, its decode if it had one."""
    cached = probe.prompt - round(grown[_COMPUTED] / probe.calls)
    made = list(steps(probe, min(cached, probe.prompt - 1), max_num_batched_tokens, max_num_seqs))
    samples = []
    if probe.calls == 1:
        prefill = [(batch, 1.0) for batch, decoding in made if not decoding]
        samples.append(Sample(grown[_PREFILL], prefill, calls=1.0))
    if probe.output > 1:
        decode = [(batch, decoding / probe.calls) for batch, decoding in made if decoding]
        samples.append(Sample(grown[_DECODE] / probe.calls, decode))
    return samples


def _outside(seconds: Mapping[int, list[float]]) -> tuple[float, float]:
    """Seconds a call spends outside the engine: alone, and more for each other call in flight.

    seconds: measured, by the number of calls in flight.
    """
    typical = {calls: median(own) for calls, own in seconds.items()}
    alone = max(typical.pop(1, 0.0), 0.0)
    more = [(taken - alone) / (calls - 1) for calls, taken in typical.items()]
    return alone, max(median(more), 0.0) if more else 0.0


# -- server -----------------------------------------------------------------------------------


class _Server:
    """A running vLLM server; every request that fails raises CalibrationError."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http, self._url = http, url.rstrip("/")
        self._random = random.Random()
        self.model = ""
        self.max_model_len = 0
        self._top_id = 0

    async def look(self, model: str | None) -> None:
        """Find the model (the first one served, if None) and token ids it knows."""
        served = (await self._json("GET", "/v1/models"))["data"]
        card = next((card for card in served if model in (None, card["id"])), None)
        if card is None:
            known = ", ".join(card["id"] for card in served)
            raise CalibrationError(f"{self._url} serves no model {model!r}, but {known}")
        self.model = card["id"]
        self.max_model_len = card.get("max_model_len") or 8192
        # Few models have a smaller vocabulary than the larger; ids beyond it are refused.
        self._top_id = 32_000
        try:
            await self.complete([[self._top_id]], 1)
        except CalibrationError:
            self._top_id = 500
            await self.complete([[self._top_id]], 1)

    def prompts(self, probe: Probe) -> list[list[int]]:
        """Prompts of random tokens, which no prefix cache has seen."""
        ids = range(3, self._top_id)
        return [self._random.choices(ids, k=probe.prompt) for _ in range(probe.calls)]

    async def complete(self, prompts: list[list[int]], output: int) -> float:
        """Send each prompt as a stream of its own, as clients do; mean seconds a call took."""
        return fmean(await asyncio.gather(*(self._stream(prompt, output) for prompt in prompts)))

    async def _stream(self, prompt: list[int], output: int) -> float:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output,
            "min_tokens": output,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
        }
        began = time.perf_counter()
        answer = await self._text("POST", "/v1/completions", json=body)
        took = time.perf_counter() - began
        if '"error"' in answer:  # a stream has begun with status 200 before it fails
            raise CalibrationError(f"{self._url}/v1/completions: {answer[:300]}")
        return took

    async def version(self) -> str:
        return str((await self._json("GET", "/version"))["version"])

    async def metrics(self) -> tuple[dict[str, float], list[dict[str, str]]]:
        """All samples summed over their labels, and the labels of each engine's KV cache."""
        totals: dict[str, float] = {}
        caches = []
        for family in text_string_to_metric_families(await self._text("GET", "/metrics")):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
                if sample.name == "vllm:cache_config_info":
                    caches.append(sample.labels)
        missing = [n for n in (_PREFILL, _DECODE, _COMPUTED) if n not in totals]
        if missing or not caches:
            raise CalibrationError(
                f"{self._url}/metrics lacks {missing or 'vllm:cache_config_info'}: is this vLLM "
                "0.28 or later, without --disable-log-stats, and not a router in front of it?"
            )
        return totals, caches

    async def idle(self) -> None:
        """Wait until no call runs."""
        deadline = time.monotonic() + _IDLE_S
        while True:
            totals, _ = await self.metrics()
            if not any(totals.get(name) for name in _BUSY):
                return
            if time.monotonic() > deadline:
                raise CalibrationError("the server is busy: calibrate one that serves nobody else")
            await asyncio.sleep(0.2)

    async def measure(self, probe: Probe) -> dict[str, float]:
        """Growth of the metrics over one probe that nobody disturbed."""
        for _ in range(_ATTEMPTS):
            prompts = self.prompts(probe)
            await self.idle()
            if probe.context and not await self._grown(
                [prompt[: probe.context] for prompt in prompts], 1
            ):
                continue
            grown = await self._grown(prompts, probe.output)
            if grown:
                return grown
        raise CalibrationError(
            f"{self._url} counts other calls than the {probe.calls} that were sent, {_ATTEMPTS} "
            "times over: calibrate a server that serves nobody else"
        )

    async def _grown(self, prompts: list[list[int]], output: int) -> dict[str, float] | None:
        """What these calls add to the metrics; None if others were counted meanwhile, or none."""
        before, _ = await self.metrics()
        took = await self.complete(prompts, output)
        deadline = time.monotonic() + _METRICS_S
        while True:
            # The answer may be here before the metrics know of it.
            after, _ = await self.metrics()
            finished = after[_FINISHED] - before[_FINISHED]
            if finished == len(prompts):
                grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
                return grown | {_CLIENT: took}
            if finished > len(prompts) or time.monotonic() > deadline:
                return None
            await asyncio.sleep(0.02)

    async def _json(self, method: str, path: str, **request: Any) -> Any:
        try:
            return msgspec.json.decode(await self._text(method, path, **request))
        except msgspec.DecodeError:
            raise CalibrationError(f"{self._url}{path}: the answer is not JSON") from None

    async def _text(self, method: str, path: str, **request: Any) -> str:
        try:
            async with self._http.request(method, self._url + path, **request) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CalibrationError(f"{self._url}{path}: {error or type(error).__name__}") from error
        if answer.status != 200:
            raise CalibrationError(f"{self._url}{path}: {answer.status} {text[:300]}")
        return text


@asynccontextmanager
async def _connect(url: str, api_key: str | None) -> AsyncIterator[_Server]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=_CALL_S)
    # No connection twice: the server closes idle ones, just when a probe may want them.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as http:
        yield _Server(http, url)


# -- the whole --------------------------------------------------------------------------------


async def calibrate(
    url: str,
    model: str | None = None,
    *,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    max_num_seqs: int = MAX_NUM_SEQS,
    rounds: int = 3,
    api_key: str | None = None,
    progress: Progress | None = None,
) -> tuple[Hardware, FitReport]:
    """Measure the idle vLLM server at `url` and return what was learned of its engine.

    The two limits are those the server runs with; it tells them to nobody. Each probe is sent
    `rounds` times, in random order. `progress(done, all)` is called after each. CalibrationError
    says what is wrong: no such server, no metrics, other traffic, several engines behind it.
    """
    async with _connect(url, api_key) as server:
        await server.look(model)
        _, caches = await server.metrics()
        if len(caches) > 1:
            raise CalibrationError(f"{len(caches)} engines behind {url}: calibrate one engine")
        block_size = int(caches[0]["block_size"])
        # One block of the pool is vLLM's null block.
        kv_tokens = (int(caches[0]["num_gpu_blocks"]) - 1) * block_size
        probes = plan(kv_tokens, server.max_model_len, max_num_batched_tokens, max_num_seqs)
        for probe in (probes[-1], max(probes, key=lambda probe: probe.new)):
            await server.measure(probe)  # warms up
        todo = probes * rounds
        random.shuffle(todo)
        samples: list[Sample] = []
        outside: dict[int, list[float]] = {}
        for done, probe in enumerate(todo, start=1):
            grown = await server.measure(probe)
            samples += _samples(probe, grown, max_num_batched_tokens, max_num_seqs)
            in_engine = sum(grown.get(name, 0.0) for name in (_QUEUE, _PREFILL, _DECODE))
            outside.setdefault(probe.calls, []).append(grown[_CLIENT] - in_engine / probe.calls)
            if progress:
                progress(done, len(todo))
        try:
            cost, report = fit(samples)
        except ValueError as error:
            raise CalibrationError(f"the measurements fit no cost: {error}") from error
        source = (
            f"fitted to {report.samples} measurements of a vLLM {await server.version()} serving "
            f"{server.model}; median error {100 * report.median_relative_error:.1f} %"
        )
        request_s, contention_s = _outside(outside)
        hardware = Hardware(
            name=server.model,
            source=source,
            kv_tokens=kv_tokens,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            cost=cost,
            request_s=request_s + report.latency_s,
            contention_s=contention_s,
        )
    return hardware, report


def calibrate_main(url: str, out: Path, **options: Any) -> tuple[Hardware, FitReport]:
    """`calibrate(url, **options)`, written to the file `out` for `presets.load`."""
    hardware, report = asyncio.run(calibrate(url, **options))
    out.write_bytes(msgspec.json.format(msgspec.json.encode(hardware), indent=2) + b"\n")
    return hardware, report
