"""Calibration against a make-believe vLLM server whose step cost we know."""

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from vllm_saga.simulator import calibrate, presets
from vllm_saga.simulator.calibrate import CalibrationError, Probe
from vllm_saga.simulator.hardware import Batch, Linear

COST = Linear(
    base_s=4e-3, token_s=3e-5, sequence_s=5e-5, pair_s=4e-9, kv_token_s=2e-7, free_tokens=128
)
LATENCY_S = 3e-3
BUDGET, SEATS = 512, 16
METRICS = """\
vllm:cache_config_info{{block_size="32",num_gpu_blocks="1001",engine="0"}} 1.0
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} 0.0
vllm:request_prefill_time_seconds_count{{engine="0"}} {finished}
vllm:request_prefill_time_seconds_sum{{engine="0"}} {prefill}
vllm:request_decode_time_seconds_sum{{engine="0"}} {decode}
vllm:request_prefill_kv_computed_tokens_sum{{engine="0"}} {computed}
"""


class FakeServer:
    """What a vLLM server answers, and the seconds its metrics would show; it never sleeps."""

    def __init__(self, vocabulary: int = 512, caching: bool = True) -> None:
        self.vocabulary, self.caching = vocabulary, caching
        self.totals = dict.fromkeys(("running", "finished", "prefill", "decode", "computed"), 0.0)
        self.known: set[tuple[int, ...]] = set()
        self.metrics_text: str | None = METRICS
        self.strangers = 0
        self.late = 0.0
        self.key: str | None = None
        self.waiting: list[tuple[int, ...]] = []

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "model", "max_model_len": 4096}]})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.fake"})

    async def metrics(self, _: web.Request) -> web.Response:
        if self.metrics_text is None:
            raise web.HTTPNotFound
        return web.Response(text=self.metrics_text.format(**self.totals))

    async def completions(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise web.HTTPUnauthorized
        body = await request.json()
        assert body["ignore_eos"] and body["stream"]
        if max(body["prompt"]) >= self.vocabulary:
            # As vLLM does: a stream has status 200 even if it only says what is wrong.
            return web.Response(text='data: {"error": {"message": "token id out of range"}}')
        # Calls that come together run together.
        self.waiting.append(tuple(body["prompt"]))
        if len(self.waiting) == 1:
            self.batch = asyncio.create_task(self._run_waiting(body["max_tokens"]))
        await self.batch
        return web.Response(text="data: [DONE]")

    async def _run_waiting(self, output: int) -> None:
        seen = 0
        while seen < len(self.waiting):
            seen = len(self.waiting)
            await asyncio.sleep(0.02)
        prompts, self.waiting = self.waiting, []
        grown = self._run(prompts, output)
        if self.strangers:
            grown["finished"] += self.strangers
        asyncio.get_running_loop().call_later(self.late, self._count, grown)

    def _count(self, grown: dict[str, float]) -> None:
        for name, value in grown.items():
            self.totals[name] += value

    def _run(self, prompts: list[tuple[int, ...]], output: int) -> dict[str, float]:
        """One engine step after the other, with a clock."""
        done = [self._cached(prompt) if self.caching else 0 for prompt in prompts]
        self.known.update(p[:end] for p in prompts for end in range(32, len(p) + 1, 32))
        grown = dict.fromkeys(("prefill", "decode"), 0.0)
        grown["computed"] = float(sum(map(len, prompts)) - sum(done))
        grown["finished"] = float(len(prompts))
        clock, first = 0.0, dict[int, float]()
        made = [0] * len(prompts)
        while min(made) < output:
            room, batch = BUDGET, {}
            for index, prompt in enumerate(prompts):
                if made[index] < output and room and len(batch) < SEATS:
                    batch[index] = min(max(len(prompt) - done[index], 1), room)
                    room -= batch[index]
            clock += COST.step_s(Batch.of((new, done[index]) for index, new in batch.items()))
            for index, new in batch.items():
                done[index] += new
                made[index] += done[index] >= len(prompts[index])
                if made[index] == 1 and index not in first:
                    first[index] = clock
                    grown["prefill"] += clock + LATENCY_S
                if made[index] == output:
                    grown["decode"] += clock - first[index]
        return grown

    def _cached(self, prompt: tuple[int, ...]) -> int:
        ends = range((len(prompt) - 1) // 32 * 32, 0, -32)
        return next((end for end in ends if prompt[:end] in self.known), 0)


@asynccontextmanager
async def serving(server: FakeServer):
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/version", server.version)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_post("/v1/completions", server.completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def measured(server: FakeServer, **options):
    limits = {"max_num_batched_tokens": BUDGET, "max_num_seqs": SEATS, "rounds": 1}
    async with serving(server) as url:
        return await calibrate.calibrate(url, **{**limits, **options})


@pytest.mark.parametrize("caching", [True, False])
async def test_a_servers_cost_comes_back(caching: bool) -> None:
    machine, report = await measured(FakeServer(caching=caching))
    assert report.median_relative_error < 0.01
    assert report.latency_s == pytest.approx(LATENCY_S, rel=0.3)
    for batch in (
        Batch.of([(1, 300)]),
        Batch.of([(1, 1000)] * 16),
        Batch.of([(400, 2000)]),
        Batch.of([(480, 1500), *[(1, 700)] * 12]),
    ):
        assert machine.step_s(batch) == pytest.approx(COST.step_s(batch), rel=0.05)
    assert machine.kv_tokens == 32_000
    assert machine.block_size == 32
    assert (machine.max_num_seqs, machine.max_num_batched_tokens) == (SEATS, BUDGET)
    assert "0.0.fake" in machine.source


async def test_progress_and_metrics_that_come_late() -> None:
    server, seen = FakeServer(), []
    server.late = 0.05
    _, report = await measured(server, progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert report.median_relative_error < 0.01


def test_the_file_written_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, report = asyncio.run(measured(FakeServer()))

    async def known(url: str, **options: object):
        return machine, report

    monkeypatch.setattr(calibrate, "calibrate", known)
    out = tmp_path / "machine.json"
    assert calibrate.calibrate_main("http://anywhere", out, rounds=1) == (machine, report)
    assert presets.load(out) == machine


async def test_a_large_vocabulary_and_a_key() -> None:
    server = FakeServer(vocabulary=128_000)
    server.key = "secret"
    _, report = await measured(server, api_key="secret")
    assert report.median_relative_error < 0.01
    with pytest.raises(CalibrationError, match="/v1/completions: 401"):
        await measured(server)


# -- refusals ---------------------------------------------------------------------------------


async def test_somebody_elses_traffic_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    server.strangers = 1
    with pytest.raises(CalibrationError, match="serves nobody else"):
        await measured(server)
    busy = FakeServer()
    busy.totals["running"] = 3.0
    monkeypatch.setattr(calibrate, "_IDLE_S", 0.3)
    with pytest.raises(CalibrationError, match="the server is busy"):
        await measured(busy)


async def test_calls_that_never_show_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_METRICS_S", 0.05)
    server = FakeServer()
    server.late = 1e3
    with pytest.raises(CalibrationError, match="counts other calls than the 16"):
        await measured(server)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "/metrics: 404"),
        ("up 1\n", "lacks .*prefill_time.*--disable-log-stats"),
        (METRICS.replace("cache_config_info", "cache"), "lacks vllm:cache_config_info"),
        (
            METRICS + METRICS.splitlines(keepends=True)[0].replace('engine="0"', 'engine="1"'),
            "2 engines behind",
        ),
        (METRICS.replace("1001", "3"), "calls of at most 51 tokens are too short"),
    ],
)
async def test_unusable_metrics_are_explained(text: str | None, complaint: str) -> None:
    server = FakeServer()
    server.metrics_text = text
    with pytest.raises(CalibrationError, match=complaint):
        await measured(server)


async def test_no_server_and_no_such_model() -> None:
    with pytest.raises(CalibrationError, match=r"127\.0\.0\.1:9/v1/models"):
        await calibrate.calibrate("http://127.0.0.1:9")
    with pytest.raises(CalibrationError, match="serves no model 'other', but model"):
        await measured(FakeServer(), model="other")


# -- probes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_tokens", "length", "budget", "seats"),
    [(450_000, 8192, 2048, 256), (426_000, 131_072, 8192, 1024), (9_600, 3072, 512, 16),
     (640, 4096, 64, 2), (100_000, 300, 512, 1)],
)  # fmt: skip
def test_a_plan_keeps_the_servers_limits(
    kv_tokens: int, length: int, budget: int, seats: int
) -> None:
    probes = calibrate.plan(kv_tokens, length, budget, seats)
    assert len(probes) == len(set(probes))
    for probe in probes:
        assert probe.calls <= seats
        assert probe.prompt + probe.output <= length
        assert probe.calls * (probe.prompt + probe.output) <= kv_tokens
        assert min(probe) >= 0
    assert {1} < {probe.calls for probe in probes} or seats == 1
    assert max(probe.new for probe in probes) > min(budget, length // 2)


def test_the_steps_of_a_probe() -> None:
    made = list(calibrate.steps(Probe(2, 64, 36, 3), 64, 50, 8))
    assert made == [
        (Batch.of([(36, 64), (14, 64)]), 0),
        (Batch.of([(1, 100), (22, 78)]), 1),
        (Batch.of([(1, 101), (1, 100)]), 2),
        (Batch.of([(1, 101)]), 1),
    ]


def test_planning_is_quick() -> None:
    began = time.perf_counter()
    for probe in calibrate.plan(426_000, 131_072, 8192, 1024):
        list(calibrate.steps(probe, probe.context, 8192, 1024))
    assert time.perf_counter() - began < 2


def test_what_a_call_spends_outside_grows_with_the_streams_in_flight() -> None:
    seconds = {1: [0.008, 0.009, 0.2], 4: [0.015], 16: [0.038, 0.040, 0.039]}
    alone, more = calibrate._outside(seconds)
    assert alone == 0.009
    assert more == pytest.approx(0.002)
    assert calibrate._outside({1: [0.01], 4: [0.005]}) == (0.01, 0.0)
    assert calibrate._outside({1: [0.01]}) == (0.01, 0.0)
