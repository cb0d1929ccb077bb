"""`vllm-saga simulate`: what would it do for this trace on that hardware?"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_saga.simulator import formats, hardware, load, policies, report, result, runner
from vllm_saga.simulator.placement import PLACEMENTS
from vllm_saga.simulator.trace import TraceError

app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False)
console = Console(stderr=True)

_MISTAKES = (
    TraceError, load.LoadError, hardware.HardwareError, policies.UnknownPolicy, typer.BadParameter,
)  # fmt: skip


@app.callback()
def simulate(
    context: typer.Context,
    trace: Annotated[
        str, typer.Option(help=f"A trace file, or builtin:NAME ({', '.join(formats.BUILTIN)}).")
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
        str, typer.Option("--hardware", help=f"{', '.join(hardware.PRESETS)}, or a .json file.")
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
        engine = hardware.load(hardware_)
        if kv_tokens:
            engine = msgspec.structs.replace(engine, kv_tokens=kv_tokens)
        if placement not in PLACEMENTS:
            raise typer.BadParameter(f"{placement!r} is no placement: {', '.join(PLACEMENTS)}")
        for name in chosen:
            if name != runner.AUTO_CAP:
                policies.maker(name)
        source = formats.load(trace, sessions, 0)
        experiment = runner.Experiment(
            tuple(source), load.parse(load_), engine, sessions or len(source), replicas, placement,
            max_gap, not sync,
        )  # fmt: skip
        left_out = experiment.population(0).dropped
        if left_out:
            console.print(f"{left_out} sessions of the trace do not fit the KV pool: left out")
        experiment, chosen, notes = searched(experiment, chosen, processes)
    except _MISTAKES as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from None
    jobs = [(experiment, name, seed) for name in chosen for seed in range(seeds)]
    results = run_with_bars(jobs, processes)
    config = {
        "trace": trace, "load": load_, "hardware": msgspec.to_builtins(engine),
        "replicas": replicas, "placement": placement, "max_gap_s": max_gap, "seeds": seeds,
        "sessions": experiment.count, "left_out": left_out, "async": not sync, **notes,
    }  # fmt: skip
    baseline = policies.BASELINE if policies.BASELINE in chosen else chosen[0]
    document = result.to_json(config, results, baseline)
    report.show(document)
    if json_out:
        json_out.write_text(json.dumps(document, indent=1) + "\n")
    if plot:
        from vllm_saga.simulator import plots

        plots.plot(results, plot)
        console.print(f"pictures: {plot}", highlight=False)


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
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(24), MofNCompleteColumn(),
        TextColumn("sessions"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        tasks = [
            bars.add_task(f"{name}, seed {seed}", total=experiment.count)
            for experiment, name, seed in jobs
        ]

        def show(done: object) -> None:
            for task, count in zip(tasks, done, strict=True):  # type: ignore[call-overload]
                bars.update(task, completed=count)

        return runner.run_all(jobs, processes, show)
