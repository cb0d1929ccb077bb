"""Every policy on every workload over a range of loads: where saga helps, and where it stops.

    .venv/bin/python -m benchmarks.sweep --traces DIR --output results

Each point (one workload under one load) is a file of its own in `output/points`, written after
each policy. A policy that is in it already is not run again, unless `--again` names it: a sweep can
be interrupted and extended, and after a change of one policy only that one (and stock, which it is
compared with) has to run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import summary
from benchmarks.options import Traces, listed
from benchmarks.workloads import WORKLOADS, load, question
from vllm_saga.simulator import load as loads
from vllm_saga.simulator import presets, result
from vllm_saga.simulator.command import run_with_bars, searched

POLICIES = (
    "vllm", "vllm-priority", "static-cap:auto", "thunderagent", "continuum", "kvflow", "plas",
    "saga-paper", "fixed-ttl:1", "fixed-ttl:10", "fixed-ttl:60", "farthest-next-use",
    "vllm-roomy", "saga-oracle", "saga",
)  # fmt: skip
console = Console()


def main(
    output: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    traces: Traces = None,
    workloads: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(WORKLOADS),
    overcommit: Annotated[
        str, typer.Option(help="Closed loops: working set / KV pool, comma-separated.")
    ] = "0.5,0.75,1.0,1.5,2.0,3.0",
    open_loop: Annotated[
        str, typer.Option(help="Open loops: % of stock's own saturation, comma-separated.")
    ] = "50,70,80,90,100,115,130",
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(POLICIES),
    again: Annotated[str, typer.Option(help="Policies to run again where they have run.")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions per run.")] = 64,
    machine: Annotated[str, typer.Option("--hardware")] = "llama3-70b-4xa100",
    kv_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    processes: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Run the points that are missing, then write the summary and the pictures anew."""
    engine = presets.load(machine, kv_tokens)
    (output / "points").mkdir(parents=True, exist_ok=True)
    for name in listed(workloads):
        trace, source = load(name, traces, sessions)
        for label, asked in _loads(name, overcommit, open_loop):
            path = output / "points" / f"{name}-{label}.json"
            before = json.loads(path.read_text()) if path.exists() else None
            wanted = _missing(before, listed(policies), listed(again))
            if not wanted:
                continue
            began = time.monotonic()
            workload = WORKLOADS[name]
            console.rule(f"{name} {workload.title}, {label}")
            asks, chosen, notes = searched(
                question(name, trace, asked, engine, sessions), wanted, processes
            )
            config = {
                "workload": name, "title": workload.title, "trace": source, "load": label,
                "hardware": engine.name, "kv_tokens": engine.kv_tokens, "sessions": sessions,
                "seeds": seeds, **notes,
            }  # fmt: skip
            results: list[result.RunResult] = []
            for policy in chosen:
                results += run_with_bars([(asks, policy, s) for s in range(seeds)], processes)
                config["took_s"] = round(time.monotonic() - began)
                document = merged(before, result.to_json(config, results, summary.STOCK))
                path.write_text(json.dumps(document, indent=1) + "\n")
            summary.pictures_of_point(results, output / "points" / f"{name}-{label}")
    summary.write(output)
    console.print(f"summary: {output / 'summary.md'}", highlight=False)


def _missing(point: summary.Json | None, asked: list[str], again: list[str]) -> list[str]:
    """What has to run at a point, stock first; nothing if all that is asked has run."""
    there = {summary.plain(run["policy"]) for run in point["runs"]} if point else set()
    missing = [name for name in asked if name not in there or name in again]
    return list(dict.fromkeys([summary.STOCK, *missing])) if missing else []


def merged(before: summary.Json | None, new: summary.Json) -> summary.Json:
    """A point with runs added, or replaced where the policy had run before."""
    if before is None:
        return new
    replaced = {summary.plain(run["policy"]) for run in new["runs"]}
    kept = {
        key: [entry for entry in before[key] if summary.plain(entry["policy"]) not in replaced]
        for key in ("runs", "paired")
    }
    config = before["config"] | new["config"]
    return {"config": config} | {key: new[key] + kept[key] for key in kept}


def _loads(name: str, overcommit: str, open_loop: str) -> Iterator[tuple[str, loads.Load]]:
    # The tenants' mix lies in their arrivals: keep it, whatever the rate.
    arrivals = "trace,rate=" if name == "W6" else ""
    for factor in listed(overcommit):
        yield f"overcommit-{factor}", loads.parse(f"overcommit:{factor}")
    for percent in listed(open_loop):
        yield f"open-auto{percent}", loads.parse(f"open:{arrivals}auto{percent}")


if __name__ == "__main__":
    typer.run(main)
