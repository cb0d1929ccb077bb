"""One benchmark: plan the load, calibrate once, then measure arm after arm on fresh servers."""

from __future__ import annotations

import asyncio
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

from benchmarks.live import arrivals, replay, routers, scale, words
from benchmarks.live.arrangement import Arrangement
from benchmarks.live.fleet import Fleet
from benchmarks.live.process import free_port
from benchmarks.live.report import ArmResult, Json
from benchmarks.live.server import Server, ServerOptions, counter_deltas, worker_cores
from vllm_saga.simulator.trace import Session


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line decides. `gap_scale` None = measure it; times in seconds.

    `schedulers`: the arms, with their routers where `replicas` is more than one. Overcommit is that
    of all replicas together; `skew` of the work hashes onto the first.
    """

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
    replicas: int = 1
    skew: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The scaled load, the same for every arm. `pool` is that of each replica."""

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
    pool = scale.pool(
        scaled,
        settings.lanes / settings.replicas,
        settings.overcommit,
        settings.block_size,
        largest,
    )
    # vLLM refuses a model length that the pool cannot hold.
    return Plan(scaled, probe, factor, pool, max_model_len=min(pool.tokens, largest + 256))


def shorten(session: scale.ScaledSession, calls: int) -> scale.ScaledSession:
    """The first calls of a session. For calibration only: measured sessions are always whole."""
    return replace(session, calls=session.calls[:calls])


class Bench:
    """Runs the arms of one plan and keeps the user informed.

    `skipped`: arms whose router, another's, could not be had, and why.
    """

    def __init__(self, settings: Settings, plan: Plan, output: Path, console: Console) -> None:
        self.settings, self.plan, self.output, self.console = settings, plan, output, console
        self.gap_scale = settings.gap_scale
        self.calibration: Json = {}
        self.skipped: dict[str, str] = {}
        self._model = settings.model
        # Every arm has the same ports: names and hashes of replicas are made of them.
        self._ports = [free_port() for _ in range(settings.replicas)]
        self.names = [f"127.0.0.1:{port}" for port in self._ports]
        self.sessions = plan.sessions
        if settings.skew:
            self.sessions = arrivals.skewed(plan.sessions, self.names, settings.skew)

    async def run(self) -> list[ArmResult]:
        """All arms, as often as there are rounds; every second round in reverse order, so that a
        machine that grows slower or faster favours none.
        """
        if self.settings.replicas > 1:
            self._model = words.make_model(self.settings.model, self.output / "model")
        arms = self.settings.schedulers
        order = [
            (name, number)
            for number in range(self.settings.rounds)
            for name in (arms[::-1] if number % 2 else arms)
        ]
        width = max(20, *(len(name) + 13 for name in arms))
        columns = (
            SpinnerColumn(), TextColumn(f"{{task.description:<{width}}}"), BarColumn(24),
            MofNCompleteColumn(), TextColumn("tasks"), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        await self._install_routers()
        results = []
        with Progress(*columns, console=self.console) as progress:
            for name, number in order:
                if name in self.skipped:
                    continue
                bar = progress.add_task(f"{name}: starting", total=len(self.sessions), note="")
                try:
                    results.append(await self._arm(name, number, progress, bar))
                except routers.RouterUnavailable as error:
                    self.skipped[name] = str(error)
                    progress.update(bar, description=f"{name}: skipped")
        return results

    async def _install_routers(self) -> None:
        """Before anything runs, as it would slow down what is measured."""
        for name in self.settings.schedulers:
            peer = routers.find_peer(Arrangement.parse(name).router or "")
            try:
                if peer is not None:
                    await routers.install(peer)
            except routers.RouterUnavailable as error:
                self.skipped[name] = str(error)

    async def _arm(
        self, name: str, round_number: int, progress: Progress, bar: TaskID
    ) -> ArmResult:
        """One arm on fresh servers: warm-up, calibration if still needed, measurement."""
        suffix = f"-{round_number + 1}" if round_number else ""
        fleet = Fleet(
            Arrangement.parse(name), self._options(), self._ports,
            self.output / f"server-{name}{suffix}.log",
        )  # fmt: skip
        async with fleet, replay.client() as http:
            progress.update(bar, description=f"{name}: warming up")
            for server in fleet.servers:
                await self._warm_up(http, server)
            if self.gap_scale is None:
                progress.update(bar, description=f"{name}: calibrating")
                await self._calibrate(http, fleet)
            progress.reset(bar, description=f"{name}: measuring")
            result = await self._measure(http, fleet, progress, bar)
            fleet.check_alive()
        progress.update(bar, description=f"{name}: done")
        return result

    def _options(self) -> ServerOptions:
        return ServerOptions(
            self._model, self.plan.pool.blocks, self.settings.block_size,
            self.plan.max_model_len, max_num_seqs=max(64, 2 * self.settings.lanes),
        )  # fmt: skip

    def _target(self, url: str, namespace: str, send_session_ids: bool = False) -> replay.Target:
        return replay.Target(
            url, self.settings.vocabulary, namespace, send_session_ids,
            as_words=self.settings.replicas > 1,
        )  # fmt: skip

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
        records = await replay.replay(
            http, self._target(server.url, "warm-up"), sessions, 4, replay.Hooks(lambda: 0.0)
        )
        for record in records:
            if record.error:
                raise RuntimeError(
                    f"warm-up failed on {server.scheduler}: {record.error}; log {server.log}"
                )

    async def _calibrate(self, http: aiohttp.ClientSession, fleet: Fleet) -> None:
        """Measure g with a quarter of the lanes, so that nothing is evicted up to overcommit 4.

        The sessions are dealt out to the servers, past the router: no choice of its counts. Gaps
        during the calibration already use the estimate made so far.
        """
        seen = [0.01, 1.0]

        def on_call(record: replay.CallRecord) -> None:
            if record.index:
                seen[0] += record.latency_s
                seen[1] += record.model_s

        hooks = replay.Hooks(gap_scale=lambda: seen[0] / seen[1], on_call=on_call)
        count = len(fleet.servers)
        parts = [self.plan.calibration[k::count] for k in range(count)]
        replays = (
            replay.replay(http, self._target(server.url, "calibration"), part, len(part), hooks)
            for server, part in zip(fleet.servers, parts, strict=True)
        )
        records = [record for part in await asyncio.gather(*replays) for record in part]
        calls = [call for record in records for call in record.calls if call.index]
        if not calls:
            raise RuntimeError(f"calibration made no call: {[record.error for record in records]}")
        measured, recorded = (sum(c.latency_s for c in calls), sum(c.model_s for c in calls))
        self.gap_scale = measured / recorded
        self.calibration = {
            "calls": len(calls), "measured_model_s_per_call": measured / len(calls),
            "recorded_model_s_per_call": recorded / len(calls), "scheduler": fleet.name,
            "prefix_hit_rate": sum(c.cached_tokens for c in calls)
            / sum(c.prompt_tokens for c in calls),
        }  # fmt: skip
        self.console.print(
            f"calibration: {measured / len(calls) * 1e3:.1f} ms model time per call here, "
            f"{recorded / len(calls):.2f} s recorded: gaps x {self.gap_scale:.5f}"
        )

    async def _measure(
        self, http: aiohttp.ClientSession, fleet: Fleet, progress: Progress, bar: TaskID
    ) -> ArmResult:
        """Replay all sessions on the lanes and take the counters before and after."""
        gap_scale = self.gap_scale or 0.0
        hooks = self._shown(gap_scale, fleet.name, progress, bar)
        target = self._target(fleet.url, "measured", self.settings.send_session_ids)
        before = await fleet.metrics(http)
        client_cpu, server_cpu, started = time.process_time(), fleet.cpu_s(), time.perf_counter()
        router_cpu = fleet.router_cpu_s()
        watch = asyncio.create_task(self._watch(fleet))
        run = asyncio.create_task(
            replay.replay(http, target, self.sessions, self.settings.lanes, hooks)
        )
        try:
            await asyncio.wait({run, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            records = await run
        finally:
            # Told to stop, or a server has died: no call may outlive the servers.
            run.cancel()
            watch.cancel()
            await asyncio.gather(run, watch, return_exceptions=True)
        ended = time.perf_counter()
        return ArmResult(
            fleet.name, records, started, ended,
            counter_deltas(before, await fleet.metrics(http)), self.settings.block_size,
            time.process_time() - client_cpu, fleet.cpu_s() - server_cpu,
            fleet.router_cpu_s() - router_cpu, len(fleet.servers),
        )  # fmt: skip

    def _shown(self, gap_scale: float, name: str, progress: Progress, bar: TaskID) -> replay.Hooks:
        """Hooks that show how far the replay has come."""
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
                    f"[red]{name}: session {record.session_id} failed: {record.error}"
                )

        return replay.Hooks(lambda: gap_scale, on_call, on_session)

    @staticmethod
    async def _watch(fleet: Fleet) -> None:
        """Fail early if a server dies instead of waiting for every request to time out."""
        while True:
            await asyncio.sleep(1.0)
            fleet.check_alive()

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
            "worker_cores": [
                core
                for k in range(self.settings.replicas)
                for core in worker_cores(k, self.settings.replicas)
            ],
            "arrivals": arrivals.shares(self.sessions, self.names) if settings["skew"] else {},
            "skipped": self.skipped,
        }
