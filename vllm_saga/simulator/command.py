"""`vllm-saga simulate`: what would it do for this trace on that hardware?"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_saga.simulator import calibrate as calibration
from vllm_saga.simulator import (
    formats,
    load,
    plots,
    policies,
    presets,
    report,
    result,
    runner,
)
from vllm_saga.simulator.hardware import HardwareError, call_alone_s
from vllm_saga.simulator.placement import PLACEMENTS
from vllm_saga.simulator.trace import Session, TraceError

app = typer.Typer(invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)

_BARS = (
    TextColumn("{task.description:<24}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
)  # fmt: skip
_MISTAKES = (
    TraceError, load.LoadError, HardwareError, policies.UnknownPolicy, typer.BadParameter,
)  # fmt: skip


@app.callback()
def simulate(
    context: typer.Context,
    trace: Annotated[
        str,
        typer.Option(
            help=f"A trace file, or builtin:NAME ({', '.join(formats.BUILTIN)}; NAME+NAME mixes)."
        ),
    ] = "builtin:swe",
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeat for several. Known: {', '.join(policies.names())}."),
    ] = None,
    load_: Annotated[
        str,
        typer.Option(
            "--load", help="closed:N lanes, open:RATE sessions/min, open:autoP, overcommit:X."
        ),
    ] = "overcommit:1.5",
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    placement: Annotated[
        str, typer.Option(help=f"Which engine a call goes to: {', '.join(PLACEMENTS)}.")
    ] = "least_loaded",
    hardware_: Annotated[
        str, typer.Option("--hardware", help=f"{', '.join(presets.PRESETS)}, or a .json file.")
    ] = "llama3-70b-4xa100",
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV pool of one engine, in tokens.")
    ] = None,
    max_gap: Annotated[
        float | None, typer.Option(min=0.0, help="Cut gaps between calls to so many seconds.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, paired across policies.")] = 1,
    sessions: Annotated[
        int | None, typer.Option(min=1, help="Sessions per run; default: the trace, or 100.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw pictures into this directory.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Runs at a time.", show_default="cores")
    ] = os.cpu_count() or 1,
    sync: Annotated[
        bool, typer.Option("--sync", help="vLLM's synchronous scheduler (--no-async-scheduling).")
    ] = False,
) -> None:
    """Replay agent sessions through real vLLM schedulers on a virtual clock, policy by policy."""
    if context.invoked_subcommand:
        return
    chosen = list(dict.fromkeys(policy or [policies.BASELINE, "saga"]))
    try:
        engine = presets.load(hardware_, kv_tokens)
        check_names(chosen, placement)
        workload, count = load_workload(trace, sessions)
        experiment = runner.Experiment(
            workload,
            load.parse(load_),
            engine,
            count,
            replicas=replicas,
            placement=placement,
            max_gap_s=max_gap,
            overlapping=not sync,
        )
        left_out = experiment.population(0).dropped
        if left_out:
            console.print(f"{left_out} sessions of the trace do not fit the KV pool: left out")
        experiment, chosen, notes = searched(experiment, chosen, processes)
    except _MISTAKES as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from None
    results = run_with_bars(
        [(experiment, name, n) for name in chosen for n in range(seeds)], processes
    )
    config = {
        "trace": trace, "load": load_, "hardware": msgspec.to_builtins(engine),
        "replicas": replicas, "placement": placement, "max_gap_s": max_gap, "seeds": seeds,
        "sessions": count, "left_out": left_out, "async": not sync, **notes,
    }  # fmt: skip
    baseline = policies.BASELINE if policies.BASELINE in chosen else chosen[0]
    document = result.to_json(config, results, baseline)
    title = f"{trace}, {load_}, {replicas} x {engine.name}, {engine.kv_tokens:,} KV tokens"
    report.show(document, title=title)
    try:
        if json_out:
            json_out.write_text(json.dumps(document, indent=1) + "\n")
        if plot:
            plots.plot(results, plot, title=title)
            console.print(f"pictures: {plot}", highlight=False)
    except (plots.PlotError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None


def check_names(chosen: Sequence[str], placement: str) -> None:
    """Raises what `_MISTAKES` lists if a policy or a placement is unknown."""
    if placement not in PLACEMENTS:
        raise typer.BadParameter(f"{placement!r} is no placement: {', '.join(PLACEMENTS)}")
    for name in chosen:
        if name != runner.AUTO_CAP:
            policies.maker(name)


def load_workload(source: str, count: int | None) -> tuple[tuple[Session, ...], int]:
    """The sessions to draw from, and how many a run plays if the user does not say."""
    made_here = source.startswith(formats.PREFIX)
    names = source.removeprefix(formats.PREFIX).split("+") if made_here else []
    sources = [formats.PREFIX + name for name in names] or [source]
    # Twice as many as a run plays, so that seeds differ in more than their order.
    wanted = math.ceil(2 * (count or formats.DEFAULT_COUNT) / len(sources))
    rounds = zip(*(formats.load(one, wanted) for one in sources), strict=True)
    sessions = tuple(chain.from_iterable(rounds))
    return sessions, count or (formats.DEFAULT_COUNT if made_here else len(sessions))


@app.command()
def calibrate(
    url: Annotated[str, typer.Argument(help="An idle vLLM server, as http://host:port.")],
    out: Annotated[Path, typer.Option(help="Where the hardware goes.")] = Path("hardware.json"),
    model: Annotated[
        str | None, typer.Option(help="Its model; default: the first it serves.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="As the server runs with: it tells nobody.")
    ] = calibration.MAX_NUM_BATCHED_TOKENS,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="As the server runs with.")
    ] = calibration.MAX_NUM_SEQS,
    rounds: Annotated[int, typer.Option(min=1, help="How often each probe is sent.")] = 3,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY")] = None,
) -> None:
    """Fit the cost of an engine step to a running vLLM server, for `--hardware hardware.json`."""
    with Progress(*_BARS, console=console) as bars:
        task = bars.add_task("probes")
        try:
            made, fit = calibration.calibrate_main(
                url,
                out,
                model=model,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                rounds=rounds,
                api_key=api_key,
                progress=lambda done, total: bars.update(task, completed=done, total=total),
            )
        except (calibration.CalibrationError, OSError) as error:
            console.print(f"[red]error:[/red] {error}", highlight=False)
            raise typer.Exit(1) from None
    alone = call_alone_s(made, 1000, 0, 1)
    console.print(
        f"{out}: {made.kv_tokens:,} KV tokens; a fresh 1,000-token prompt takes {alone:.3f} s; "
        f"{fit.samples} samples, median error {fit.median_relative_error:.1%}, "
        f"nine in ten within {fit.p90_relative_error:.1%}",
        highlight=False,
    )


def searched(
    experiment: runner.Experiment, chosen: list[str], processes: int
) -> tuple[runner.Experiment, list[str], dict[str, float]]:
    """Find what has to be measured first: stock's saturation, the best static cap."""
    notes: dict[str, float] = {}
    if isinstance(experiment.load, load.AutoOpen):
        with console.status("measuring stock vLLM's saturation"):
            most = runner.saturation_per_min(experiment, processes)
        console.print(f"stock saturates at {most:.3f} sessions/min")
        notes["saturation_per_min"] = most
        experiment = replace(experiment, load=experiment.load.at(most))
    if runner.AUTO_CAP in chosen:
        with console.status("searching the best static cap"):
            cap = runner.best_static_cap(experiment, processes)
        console.print(f"best static cap: {cap} sessions per replica")
        notes["static_cap"] = cap
        chosen = [f"static-cap:{cap}" if name == runner.AUTO_CAP else name for name in chosen]
    return experiment, list(dict.fromkeys(chosen)), notes


def run_with_bars(jobs: list[runner.Job], processes: int) -> list[result.RunResult]:
    with Progress(*_BARS, console=console) as bars:
        tasks = [
            bars.add_task(f"{name}, seed {seed}", total=experiment.count)
            for experiment, name, seed in jobs
        ]

        def show(done: object) -> None:
            for task, count in zip(tasks, done, strict=True):  # type: ignore[call-overload]
                bars.update(task, completed=count)

        return runner.run_all(jobs, processes, show)
