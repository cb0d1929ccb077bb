"""Command line of the live benchmark: `python -m benchmarks.live --help`."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.live import arrangement, report
from benchmarks.live.process import ServerError
from benchmarks.live.run import Bench, Settings, make_plan
from vllm_saga.simulator import builtin, trace

console = Console()


def main(
    model: Annotated[Path, typer.Option(help="Model directory to serve (weights are random).")],
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="Trace in format v1; default: built-in workload.")
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Servers behind a router; more than 1 compares routers.")
    ] = 1,
    overcommit: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            help="Lanes x time-mean context / KV pools, in tokens; default 2, of replicas 1.5.",
        ),
    ] = None,
    sessions: Annotated[int | None, typer.Option(min=1, help="Sessions per arm.")] = None,
    lanes: Annotated[int | None, typer.Option(min=1, help="Sessions alive at a time.")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A small run: two minutes with one server."),
    ] = False,
    no_session_ids: Annotated[
        bool, typer.Option("--no-session-ids", help="Send no X-Session-ID header.")
    ] = False,
    schedulers: Annotated[
        str, typer.Option(help="Arms, comma-separated: stock, saga, or a class path.")
    ] = "stock,saga",
    arrangements: Annotated[
        str, typer.Option(help="Arms of --replicas, comma-separated: SCHEDULER+ROUTER.")
    ] = ",".join(arrangement.DEFAULT),
    skew: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.95,
            help="Share of the work whose ids hash onto the first replica; 0 = any.",
        ),
    ] = 2 / 3,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Times each arm is run; default 1, or 4 where overcommit is at most 1."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Choice and order of sessions.")] = 0,
    mean_prompt: Annotated[
        float | None, typer.Option(help="Mean prompt after scaling, tokens.")
    ] = None,
    gap_scale: Annotated[
        float | None, typer.Option(help="Scale of gaps; default: measured.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("demo-report"),
) -> None:
    """Replay agent sessions against real vLLM servers, once for each arm, and compare."""
    began = time.monotonic()
    named = schedulers if replicas == 1 else arrangements
    wanted = overcommit or (2.0 if replicas == 1 else 1.5)
    try:
        config = json.loads((model / "config.json").read_text())
        settings = Settings(
            schedulers=read_arms(named, replicas),
            sessions=sessions or (7 * replicas if quick else 16 * max(2, replicas)),
            lanes=lanes or (5 * replicas if quick else 6 * max(2, replicas)),
            overcommit=wanted,
            mean_prompt_tokens=mean_prompt or (768 if quick else 1536),
            seed=seed,
            model=model,
            vocabulary=config["vocab_size"],
            gap_scale=gap_scale,
            send_session_ids=not no_session_ids,
            calibration_calls=15 if quick else 40,
            rounds=rounds or (4 if wanted <= 1 and not quick else 1),
            replicas=replicas,
            skew=skew if replicas > 1 else 0.0,
        )
        load = (
            trace.read(trace_file) if trace_file else builtin.sessions(2 * settings.sessions, seed)
        )
    except (trace.TraceError, OSError, KeyError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from error
    source = trace_file.name if trace_file else "built-in (published figures)"
    bench = Bench(settings, make_plan(load, settings), output, console)
    output.mkdir(parents=True, exist_ok=True)
    announce(bench, source)
    try:
        results = asyncio.run(until_told_to_stop(bench))
    except (ServerError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    except asyncio.CancelledError:
        console.print("stopped")
        raise typer.Exit(143) from None
    if not finish(bench, source, results, time.monotonic() - began):
        raise typer.Exit(1)


def read_arms(text: str, replicas: int) -> tuple[str, ...]:
    """The arms that a list between commas names, each once. Raises `typer.BadParameter`."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("name at least one arm")
    for name in names:
        try:
            router = arrangement.Arrangement.parse(name).router
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if (router is None) != (replicas == 1):
            raise typer.BadParameter(
                f"{name!r}: a router needs --replicas 2 or more, and replicas need a router"
            )
    return names


async def until_told_to_stop(bench: Bench) -> list[report.ArmResult]:
    """Run the benchmark; SIGTERM cancels it in good order, so that no server stays behind."""
    run = asyncio.ensure_future(bench.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, run.cancel)
    return await run


def announce(bench: Bench, source: str) -> None:
    """Say what will be run."""
    plan, settings = bench.plan, bench.settings
    calls = sum(len(session.calls) for session in plan.sessions)
    of_each = f"{settings.replicas} replicas, each with a " if settings.replicas > 1 else ""
    console.print(
        f"workload {source}: {len(plan.sessions)} sessions, {calls} calls, "
        f"tokens x {plan.token_scale:.4f}\n"
        f"load: {settings.lanes} lanes, {of_each}KV pool {plan.pool.blocks} blocks of "
        f"{settings.block_size} = {plan.pool.tokens:,} tokens, "
        f"overcommit {plan.pool.overcommit:.2f}",
        highlight=False,
    )
    if settings.skew:
        console.print(
            f"arrivals: {settings.skew:.0%} of the work hashes onto the first replica",
            highlight=False,
        )


def finish(bench: Bench, source: str, results: list[report.ArmResult], took_s: float) -> bool:
    """Table, files and a closing line. Returns whether every session has completed."""
    for name, reason in bench.skipped.items():
        console.print(f"{name} was skipped: {reason}", markup=False, highlight=False)
    arms = [
        [result for result in results if result.scheduler == name]
        for name in bench.settings.schedulers
        if name not in bench.skipped
    ]
    runs = [report.summarise(report.pool(rounds)) for rounds in arms]
    if not runs:
        return False
    settings = bench.settings
    title = (
        f"{source}: {settings.sessions} tasks, {settings.lanes} at a time, "
        f"overcommit {bench.plan.pool.overcommit:.2f}"
    )
    if settings.replicas > 1:
        title = f"{settings.replicas} replicas, {title}"
    if settings.rounds > 1:
        title += f", {settings.rounds} rounds"
    report.write_json(bench.output / "report.json", bench.config(source) | {"took_s": took_s}, runs)
    # One round of each is enough to look at.
    report.picture(bench.output / "report.png", [rounds[0] for rounds in arms], title)
    if settings.replicas > 1:
        wide = Console(width=max(console.width, 130))
        wide.print(report.table_of_arrangements(runs, title))
    else:
        console.print(report.table(runs, title))
    shares = ", ".join(f"{run['scheduler']} {run['client_cpu_share']:.0%}" for run in runs)
    console.print(f"client CPU (of one core): {shares}; whole run {took_s:.0f} s", highlight=False)
    console.print(
        f"report: {bench.output / 'report.json'}, {bench.output / 'report.png'}", highlight=False
    )
    return not any(run["failed"] for run in runs)


if __name__ == "__main__":
    typer.run(main)
