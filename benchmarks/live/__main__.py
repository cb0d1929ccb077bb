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

from benchmarks.live import report
from benchmarks.live.run import Bench, Settings, make_plan
from benchmarks.live.server import ServerError
from vllm_saga.simulator import builtin, trace

console = Console()


def main(
    model: Annotated[Path, typer.Option(help="Model directory to serve (weights are random).")],
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="Trace in format v1; default: built-in workload.")
    ] = None,
    overcommit: Annotated[
        float, typer.Option(min=0.05, help="Lanes x time-mean context / KV pool, in tokens.")
    ] = 2.0,
    sessions: Annotated[int | None, typer.Option(min=1, help="Sessions per arm.")] = None,
    lanes: Annotated[int | None, typer.Option(min=1, help="Sessions alive at a time.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small run, two minutes at most.")
    ] = False,
    no_session_ids: Annotated[
        bool, typer.Option("--no-session-ids", help="Send no X-Session-ID header.")
    ] = False,
    schedulers: Annotated[
        str, typer.Option(help="Arms, comma-separated: stock, saga, or a class path.")
    ] = "stock,saga",
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
    """Replay agent sessions against a real vLLM server, once per scheduler, and compare."""
    began = time.monotonic()
    arms = tuple(name.strip() for name in schedulers.split(",") if name.strip())
    if not arms:
        raise typer.BadParameter("name at least one scheduler")
    try:
        config = json.loads((model / "config.json").read_text())
        settings = Settings(
            schedulers=arms,
            sessions=sessions or (7 if quick else 32),
            lanes=lanes or (5 if quick else 12),
            overcommit=overcommit,
            mean_prompt_tokens=mean_prompt or (768 if quick else 1536),
            seed=seed,
            model=model,
            vocabulary=config["vocab_size"],
            gap_scale=gap_scale,
            send_session_ids=not no_session_ids,
            calibration_calls=15 if quick else 40,
            rounds=rounds or (4 if overcommit <= 1 and not quick else 1),
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
    runs = [
        report.summarise(report.pool([arm for arm in results if arm.scheduler == name]))
        for name in dict.fromkeys(arms)
    ]
    finish(bench, source, results, runs, time.monotonic() - began)
    if any(run["failed"] for run in runs):
        raise typer.Exit(1)


async def until_told_to_stop(bench: Bench) -> list[report.ArmResult]:
    """Run the benchmark; SIGTERM cancels it in good order, so that no server stays behind."""
    run = asyncio.ensure_future(bench.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, run.cancel)
    return await run


def announce(bench: Bench, source: str) -> None:
    """Say what will be run."""
    plan, settings = bench.plan, bench.settings
    calls = sum(len(session.calls) for session in plan.sessions)
    console.print(
        f"workload {source}: {len(plan.sessions)} sessions, {calls} calls, "
        f"tokens x {plan.token_scale:.4f}\n"
        f"load: {settings.lanes} lanes, KV pool {plan.pool.blocks} blocks of "
        f"{settings.block_size} = {plan.pool.tokens:,} tokens, "
        f"overcommit {plan.pool.overcommit:.2f}",
        highlight=False,
    )


def finish(
    bench: Bench,
    source: str,
    results: list[report.ArmResult],
    runs: list[report.Json],
    took_s: float,
) -> None:
    """Table, files and a closing line."""
    settings = bench.settings
    title = (
        f"{source}: {settings.sessions} tasks, {settings.lanes} at a time, "
        f"overcommit {bench.plan.pool.overcommit:.2f}"
    )
    if settings.rounds > 1:
        title += f", {settings.rounds} rounds"
    report.write_json(bench.output / "report.json", bench.config(source) | {"took_s": took_s}, runs)
    # One round of each is enough to look at.
    report.picture(bench.output / "report.png", results[: len(runs)], title)
    console.print(report.table(runs, title))
    shares = ", ".join(f"{run['scheduler']} {run['client_cpu_share']:.0%}" for run in runs)
    console.print(f"client CPU (of one core): {shares}; whole run {took_s:.0f} s", highlight=False)
    console.print(
        f"report: {bench.output / 'report.json'}, {bench.output / 'report.png'}", highlight=False
    )


if __name__ == "__main__":
    typer.run(main)
