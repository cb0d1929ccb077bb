"""`python -m benchmarks.equivalence`: with saga nothing changes but when calls run.

outputs: lm-evaluation-harness asks stock alone, stock under pressure and saga under pressure, with
agents beside it and a KV pool too small for all. Every answer and every score must be the same, and
calls must have been held, preempted, and their KV evicted. traffic: `vllm bench serve` without any
agents, at 50, 80 and 100 % of what stock carries. Exit status 1 if something is not the same.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.equivalence import compare, model, outputs, ratios, traffic
from benchmarks.live.environments import KEPT
from benchmarks.live.process import ServerError

console = Console()
_MOST_LINES = 20


class Part(StrEnum):
    OUTPUTS = "outputs"
    TRAFFIC = "traffic"


def main(
    only: Annotated[Part | None, typer.Option(help="One part; default: both.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few minutes; too short to resolve 2 %.")
    ] = False,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Of each of the harness' tasks; default 24.")
    ] = None,
    lanes: Annotated[int, typer.Option(min=1, help="Agents beside the harness.")] = 8,
    calls_per_s: Annotated[
        float, typer.Option(min=0.1, help="Calls that agents begin in a second, at most.")
    ] = 4.0,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Times that each arm meets each load; default 3.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Of traffic each time; default 12.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of tasks, agents and traffic.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the report, logs and samples.")] = Path(
        "equivalence-report"
    ),
) -> None:
    """Stock and saga: the same answers under pressure, and ordinary traffic as fast?"""
    began = time.monotonic()
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        minutes = (time.monotonic() - began) / 60
        console.print(f"{minutes:5.1f} min  {line}", highlight=False, markup=False, soft_wrap=True)

    report: dict[str, Any] = {"quick": quick, "seed": seed}
    wrong: list[str] = []
    try:
        made = model.make(KEPT / "equivalence-model")
        if only is not Part.TRAFFIC:
            count = documents or (6 if quick else 24)
            plan = outputs.Plan(made, output / "outputs", count, lanes, calls_per_s, seed=seed)
            found = asyncio.run(outputs.run(plan, say))
            report["outputs"] = outputs.document(found)
            wrong += report["outputs"]["problems"]
            show_outputs(found)
        if only is not Part.OUTPUTS:
            load = traffic.Plan(
                made, output / "traffic", rounds or (1 if quick else 3),
                seconds or (5.0 if quick else 12.0), 24 if quick else 120, seed,
            )  # fmt: skip
            capacity, cells = asyncio.run(traffic.run(load, say))
            report["traffic"], unequal = traffic_report(capacity, cells)
            wrong += unequal
    except (ServerError, compare.NoSamples, model.NotMade) as error:
        console.print("error:", style="red", end=" ")
        console.print(error, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report["took_s"] = round(time.monotonic() - began, 1)
    path = output / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    for line in wrong[:_MOST_LINES]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(wrong) > _MOST_LINES:
        console.print(f"and {len(wrong) - _MOST_LINES} more")
    console.print(f"{'not the same' if wrong else 'the same'}; report: {path}", highlight=False)
    raise typer.Exit(bool(wrong))


def _wide() -> Console:
    return Console(width=max(console.width, 140))


def show_outputs(found: list[outputs.Outcome]) -> None:
    """What happened on each server, and how many samples it answered."""
    table = Table(title="The harness' answers under pressure")
    names = ("preemptions", "evicted_blocks", "holds", "forced", "harness_held", "session_held")
    for column in ("arm", "samples", *names):
        table.add_column(column.replace("_", " "), justify="right")
    for outcome in found:
        seen = asdict(outcome.seen)
        samples = sum(len(part.samples) for part in outcome.results.values())
        table.add_row(outcome.arm.name, str(samples), *(str(seen[name]) for name in names))
    _wide().print(table)


def traffic_report(
    capacity: dict[str, float], cells: list[traffic.Cell]
) -> tuple[dict[str, Any], list[str]]:
    """The report's part, and what is resolved to be unequal; prints a table."""
    groups = traffic.compared(cells)
    table = Table(title="saga / stock of ordinary traffic, and stock / stock (the noise)")
    table.add_column("load")
    for name in traffic.METRICS.values():
        table.add_column(name, justify="right")
    for group, metrics in groups.items():
        table.add_row(group, *(f"{m['saga']}\n{m['control']}" for m in metrics.values()))
    _wide().print(table)
    everything = groups["all"]
    overall = {name: ratios.verdict(m["saga"], m["control"]) for name, m in everything.items()}
    shown = ", ".join(f"{traffic.METRICS[name]}: {said}" for name, said in overall.items())
    console.print(f"over all loads, within 2 %? {shown}", highlight=False)
    told = {
        group: {name: {arm: asdict(r) for arm, r in m.items()} for name, m in metrics.items()}
        for group, metrics in groups.items()
    }
    unequal = [
        f"traffic: {traffic.METRICS[name]} is {everything[name]['saga']} of stock's"
        for name, said in overall.items()
        if said == "unequal"
    ]
    report = {
        "capacity_requests_per_s": capacity,
        "within_2_percent": overall,
        "ratios": told,
        "cells": [asdict(cell) for cell in cells],
    }
    return report, unequal


if __name__ == "__main__":
    typer.run(main)
