"""One benchmark: plan the load, calibrate once, then measure arm after arm on fresh servers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.live import replay, scale
from benchmarks.live.report import ArmResult, Json
from benchmarks.live.server import Server, ServerOptions, counter_deltas, scrape, worker_cores
from vllm_saga.simulator.trace import Session


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line decides. `gap_scale` None = measure it; times in seconds."""

    schedulers: tuple[str, ...]
    sessions: int
    lanes: int
    overcommit: float
    mean_prompt_tokens: float
    seed: int
    model: Path
    vocabulary: int
    gap_scale: float | None = None
    gap_cap_s: float = 600.0
    send_session_ids: bool = True
    block_size: int = 32
    calibration_calls: int = 40
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """The scaled load, the same for every arm."""

    sessions: list[scale.ScaledSession]
    calibration: list[scale.ScaledSession]
    token_scale: float
    pool: scale.Pool
    max_model_len: int


def make_plan(trace: Sequence[Session], settings: Settings) -> Plan:
    """Choose and scale sessions; those for calibration come after the measured ones."""
    probes = max(1, settings.lanes // 4)
    pairs = scale.pick(trace, settings.sessions + probes, settings.seed)
    measured = pairs[: settings.sessions]
    factor = scale.token_scale([session for _, session in measured], settings.mean_prompt_tokens)
    scaled = [
        scale.scale_session(name, session, factor, settings.gap_cap_s) for name, session in measured
    ]
    probe = [
        shorten(
            scale.scale_session(f"calibration/{name}", session, factor, settings.gap_cap_s),
            settings.calibration_calls,
        )
        for name, session in pairs[settings.sessions :]
    ]
    largest = max(session.max_context_tokens for session in [*scaled, *probe])
    pool = scale.pool(scaled, settings.lanes, settings.overcommit, settings.block_size, largest)
    # vLLM refuses a model length that the pool cannot hold.
    return Plan(scaled, probe, factor, pool, max_model_len=min(pool.tokens, largest + 256))


def shorten(session: scale.ScaledSession, calls: int) -> scale.ScaledSession:
    """The first calls of a session. For calibration only: measured sessions are always whole."""
    return replace(session, calls=session.calls[:calls])


class Bench:
    """Runs the arms of one plan and keeps the user informed."""

    def __init__(self, settings: Settings, plan: Plan, output: Path, console: Console) -> None:
        self.settings, self.plan, self.output, self.console = settings, plan, output, console
        self.gap_scale = settings.gap_scale
        self.calibration: Json = {}

    async def run(self) -> list[ArmResult]:
        """All arms, as often as there are rounds; every second round in reverse order, so that a
        machine that grows slower or faster favours none.
        """
        arms = self.settings.schedulers
        order = [
            (name, number)
            for number in range(self.settings.rounds)
            for name in (arms[::-1] if number % 2 else arms)
        ]
        columns = (
            SpinnerColumn(), TextColumn("{task.description:<20}"), BarColumn(24),
            MofNCompleteColumn(), TextColumn("tasks"), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            return [await self._arm(name, number, progress) for name, number in order]

    async def _arm(self, scheduler: str, round_number: int, progress: Progress) -> ArmResult:
        """One arm on a fresh server: warm-up, calibration if still needed, measurement."""
        options = ServerOptions(
            self.settings.model, self.plan.pool.blocks, self.settings.block_size,
            self.plan.max_model_len, max_num_seqs=max(64, 2 * self.settings.lanes),
        )  # fmt: skip
        bar = progress.add_task(f"{scheduler}: starting", total=len(self.plan.sessions), note="")
        suffix = f"-{round_number + 1}" if round_number else ""
        log = self.output / f"server-{scheduler}{suffix}.log"
        executable = Path(sys.executable).with_name("vllm")
        async with Server(options, scheduler, log, executable) as server, replay.client() as http:
            progress.update(bar, description=f"{scheduler}: warming up")
            await self._warm_up(http, server)
            if self.gap_scale is None:
                progress.update(bar, description=f"{scheduler}: calibrating")
                await self._calibrate(http, server)
            progress.reset(bar, description=f"{scheduler}: measuring")
            result = await self._measure(http, server, progress, bar)
            server.check_alive()
        progress.update(bar, description=f"{scheduler}: done")
        return result

    async def _warm_up(self, http: aiohttp.ClientSession, server: Server) -> None:
        """Touch every code path once, with single calls that belong to no session."""
        length = round(self.settings.mean_prompt_tokens)
        calls = [
            scale.ScaledCall(max(2, length // d), 0, 8, None, (), 0.0, 1.0)
            for d in (64, 8, 2, 1) * 2
        ]
        sessions = [
            scale.ScaledSession(f"warm-up-{k}", (call,), None, 0, 1.0, 1.0)
            for k, call in enumerate(calls)
        ]
        target = replay.Target(
            server.url, self.settings.vocabulary, "warm-up", send_session_ids=False
        )
        records = await replay.replay(
            http, target, sessions, 4, replay.Hooks(gap_scale=lambda: 0.0)
        )
        for record in records:
            if record.error:
                raise RuntimeError(
                    f"warm-up failed on {server.scheduler}: {record.error}; log {server.log}"
                )

    async def _calibrate(self, http: aiohttp.ClientSession, server: Server) -> None:
        """Measure g with a quarter of the lanes, so that nothing is evicted up to overcommit 4.

        Gaps during the calibration already use the estimate made so far.
        """
        seen = [0.01, 1.0]

        def on_call(record: replay.CallRecord) -> None:
            if record.index:
                seen[0] += record.latency_s
                seen[1] += record.model_s

        hooks = replay.Hooks(gap_scale=lambda: seen[0] / seen[1], on_call=on_call)
        target = replay.Target(
            server.url, self.settings.vocabulary, "calibration", send_session_ids=False
        )
        records = await replay.replay(
            http, target, self.plan.calibration, len(self.plan.calibration), hooks
        )
        calls = [call for record in records for call in record.calls if call.index]
        if not calls:
            raise RuntimeError(f"calibration made no call: {[record.error for record in records]}")
        measured, recorded = (sum(c.latency_s for c in calls), sum(c.model_s for c in calls))
        self.gap_scale = measured / recorded
        self.calibration = {
            "calls": len(calls), "measured_model_s_per_call": measured / len(calls),
            "recorded_model_s_per_call": recorded / len(calls), "scheduler": server.scheduler,
            "prefix_hit_rate": sum(c.cached_tokens for c in calls)
            / sum(c.prompt_tokens for c in calls),
        }  # fmt: skip
        self.console.print(
            f"calibration: {measured / len(calls) * 1e3:.1f} ms model time per call here, "
            f"{recorded / len(calls):.2f} s recorded: gaps x {self.gap_scale:.5f}"
        )

    async def _measure(
        self, http: aiohttp.ClientSession, server: Server, progress: Progress, bar: TaskID
    ) -> ArmResult:
        """Replay all sessions on the lanes and take the counters before and after."""
        cached, prompt, calls = 0, 0, 0

        def on_call(record: replay.CallRecord) -> None:
            nonlocal cached, prompt, calls
            cached, prompt, calls = (
                cached + record.cached_tokens,
                prompt + record.prompt_tokens,
                calls + 1,
            )
            progress.update(bar, note=f"{calls} calls, {cached / prompt:.0%} from cache")

        def on_session(record: replay.SessionRecord) -> None:
            progress.advance(bar)
            if record.error:
                self.console.print(
                    f"[red]{server.scheduler}: session {record.session_id} failed: {record.error}"
                )

        gap_scale = self.gap_scale or 0.0
        hooks = replay.Hooks(lambda: gap_scale, on_call, on_session)
        target = replay.Target(
            server.url, self.settings.vocabulary, "measured", self.settings.send_session_ids
        )
        before = await scrape(http, server.url)
        client_cpu, server_cpu, started = time.process_time(), server.cpu_s(), time.perf_counter()
        watch = asyncio.create_task(self._watch(server))
        try:
            run = asyncio.create_task(
                replay.replay(http, target, self.plan.sessions, self.settings.lanes, hooks)
            )
            await asyncio.wait({run, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                run.cancel()
                watch.result()
            records = await run
        finally:
            watch.cancel()
        ended = time.perf_counter()
        return ArmResult(
            server.scheduler, records, started, ended, counter_deltas(before, await scrape(http,
            server.url)), self.settings.block_size, time.process_time() - client_cpu, server.cpu_s()
            - server_cpu,
        )  # fmt: skip

    @staticmethod
    async def _watch(server: Server) -> None:
        """Fail early if the server dies instead of waiting for every request to time out."""
        while True:
            await asyncio.sleep(1.0)
            server.check_alive()

    def config(self, source: str) -> Json:
        """What is needed to run the same benchmark again."""
        plan, settings = self.plan, asdict(self.settings)
        return settings | {
            "model": str(self.settings.model.name),
            "trace": source,
            "token_scale": plan.token_scale,
            "gap_scale": self.gap_scale,
            "calibration": self.calibration,
            "duty_recorded": scale.duty(plan.sessions),
            "mean_context_tokens": scale.mean_context_tokens(plan.sessions),
            "calls": sum(len(session.calls) for session in plan.sessions),
            "kv_blocks": plan.pool.blocks,
            "kv_pool_tokens": plan.pool.tokens,
            "overcommit_real": plan.pool.overcommit,
            "max_model_len": plan.max_model_len,
            "worker_cores": list(worker_cores()),
        }
