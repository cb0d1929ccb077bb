"""Many engines behind a router: which scheduler and which placement, on the same work.

    .venv/bin/python -m benchmarks.replicas --traces DIR --output results/replicas

Sessions of W1 and W3 (or what `--workloads` says), as many of each, arrive at a share of what so
many engines with stock vLLM can carry. An arrangement is named scheduler@placement:
`vllm@sticky` is stock vLLM with prefix caching behind affinity routing.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from benchmarks.options import Traces, listed
from benchmarks.workloads import WORKLOADS, load
from vllm_saga.simulator import load as loads
from vllm_saga.simulator import policies, presets, report, result, runner
from vllm_saga.simulator.command import check_names, run_with_bars, searched
from vllm_saga.simulator.result import RunResult
from vllm_saga.simulator.trace import Session

console = Console()


def main(
    output: Annotated[Path, typer.Option(help="Results folder.")] = Path("results/replicas"),
    traces: Traces = None,
    workloads: Annotated[str, typer.Option(help="Comma-separated; as many of each.")] = "W1,W3",
    arrangements: Annotated[
        str, typer.Option(help="scheduler@placement, comma-separated; the first is compared with.")
    ] = "vllm@sticky,vllm@prefix_aware,saga@sticky,saga@saga-nosteal,saga@saga",
    percent: Annotated[
        str, typer.Option(help="Loads in % of stock's saturation, comma-separated.")
    ] = "80,100",
    rate: Annotated[
        float | None, typer.Option(help="Stock's saturation, sessions/min an engine; else searched")
    ] = None,
    cv: Annotated[
        float, typer.Option(min=0.1, help="Of the times between arrivals; 1: Poisson.")
    ] = 1.0,
    replicas: Annotated[int, typer.Option(min=2)] = 16,
    sessions: Annotated[int, typer.Option(min=1, help="For each engine, in the mean.")] = 40,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    machine: Annotated[str, typer.Option("--hardware")] = "llama3-70b-4xa100",
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Of one engine.")] = None,
    processes: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Run every arrangement at every load; print tables, write JSON after each load."""
    arms = [_arrangement(text) for text in listed(arrangements)]
    engine = presets.load(machine, kv_tokens)
    names = listed(workloads)
    gaps = [gap for name in names if (gap := WORKLOADS[name].max_gap_s) is not None]
    lengths = [most for name in names if (most := WORKLOADS[name].max_context) is not None]
    one = runner.Experiment(
        mixed(names, traces, sessions * replicas), loads.AutoOpen(100.0), engine, 2 * sessions,
        max_gap_s=max(gaps, default=None), max_context=min(lengths, default=None),
    )  # fmt: skip
    if rate is None:
        rate = searched(one, [], processes)[2]["saturation_per_min"]
    output.mkdir(parents=True, exist_ok=True)
    for share in map(float, listed(percent)):
        arrive = loads.AutoOpen(share, loads.Open(cv=cv)).at(rate * replicas)
        asked = replace(one, load=arrive, count=sessions * replicas, replicas=replicas)
        console.rule(f"{replicas} engines, {share:g} % of what stock carries")
        runs = run_with_bars(
            [
                (replace(asked, placement=placement), policy, seed)
                for policy, placement in arms
                for seed in range(seeds)
            ],
            processes,
        )
        for number, run in enumerate(runs):
            run.policy = "@".join(arms[number // seeds])
        config = {
            "workloads": names, "hardware": engine.name, "kv_tokens": engine.kv_tokens,
            "replicas": replicas, "sessions": asked.count, "seeds": seeds, "percent": share,
            "saturation_per_min": rate, "cv": cv,
        }  # fmt: skip
        document = result.to_json(config, runs, runs[0].policy)
        report.show(document)
        console.print(spread_table(runs))
        path = output / f"open-{share:g}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"all figures: {path}", highlight=False)


def mixed(names: list[str], traces: Path | None, count: int) -> tuple[Session, ...]:
    """Sessions of several workloads, as many of each."""
    found = [load(name, traces, count)[0] for name in names]
    return tuple(chain.from_iterable(zip(*found, strict=False)))


def spread_table(runs: list[RunResult]) -> Table:
    """How work was spread over the engines; one row for each arrangement."""
    headings = ("same engine", "busiest/mean", "moved calls")
    table = Table("arrangement", *(Column(heading, justify="right") for heading in headings))
    for name, own in result.by_policy(runs).items():
        notes = [run.notes for run in own]
        table.add_row(
            name,
            format(fmean(note["co_location"] for note in notes), ".1%"),
            format(fmean(note["load_max_over_mean"] for note in notes), ".2f"),
            format(fmean(note["moves"] for note in notes), ".0f"),
        )
    return table


def _arrangement(text: str) -> tuple[str, str]:
    policy, at, placement = text.partition("@")
    if not at:
        raise typer.BadParameter(f"--arrangements: {text!r} is not scheduler@placement")
    try:
        check_names([policy], placement)
    except policies.UnknownPolicy as error:
        raise typer.BadParameter(f"--arrangements: {error}") from None
    return policy, placement


if __name__ == "__main__":
    typer.run(main)
