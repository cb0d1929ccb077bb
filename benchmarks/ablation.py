"""What each part of the policy is worth: saga without it, on the same work.

    .venv/bin/python -m benchmarks.ablation --traces DIR --output results/ablation

Every variant is one setting away from the default, or one thing more or less that clients tell.
The picture shows what `patience` trades: mean task completion against the p99 step wait.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.options import Traces
from benchmarks.workloads import WORKLOADS, load, question
from vllm_saga.simulator import load as loads
from vllm_saga.simulator import presets
from vllm_saga.simulator.command import run_with_bars
from vllm_saga.simulator.result import RunResult, summarise

console = Console()
Json = dict[str, Any]


class Variant(NamedTuple):
    """One arm: what is different, the policy, and settings that differ from the default."""

    title: str
    policy: str = "saga"
    knobs: tuple[tuple[str, Any], ...] = ()


DEFAULT = Variant("saga")
PATIENCE = tuple(
    Variant(f"patience {value:g}", knobs=(("patience", value),)) for value in (0.0, 0.25, 0.75, 1.0)
)
VARIANTS = (
    Variant("stock vLLM", "vllm"),
    DEFAULT,
    Variant("no residency (nothing is held)", knobs=(("residency", False),)),
    Variant("stock's order of eviction", knobs=(("retention", "stock"),)),
    Variant("eviction: LRU of contexts", knobs=(("retention", "lru"),)),
    Variant("eviction: WA-LRU and TTL", knobs=(("retention", "wa-lru"),)),
    Variant("eviction: Continuum's TTL", knobs=(("retention", "continuum"),)),
    *PATIENCE,
    Variant("oldest first (short_first 0)", knobs=(("short_first", 0.0),)),
    Variant("the pool is never overdrawn", knobs=(("overdraft", 0.0),)),
    Variant("prefills at full speed", knobs=(("pace_prefills", False),)),
    Variant("give up at P(return) < 0.4", knobs=(("give_up_probability", 0.4),)),
    Variant("no tool names", "saga-toolless"),
    Variant("no session ids (lineage)", "saga-lineage"),
    Variant("ends declared, nothing else", "saga-ends"),
    Variant("right hints", "saga-hinted"),
    Variant("wrong hints, shuffled tools", "saga-misled"),
    Variant("told the future (offline bound)", "saga-oracle"),
)
COLUMNS = (
    ("task mean, s", ("task_completion_s", "mean"), ".0f"),
    ("task p95, s", ("task_completion_s", "p95"), ".0f"),
    ("step wait mean, s", ("step_wait_s", "mean"), ".2f"),
    ("step wait p99, s", ("step_wait_s", "p99"), ".1f"),
    ("tasks/min", ("tasks_per_min",), ".3f"),
    ("prefix hits", ("prefix_hit_rate",), ".3f"),
)


def main(
    output: Annotated[Path, typer.Option(help="Results folder.")] = Path("results/ablation"),
    traces: Traces = None,
    workloads: Annotated[str, typer.Option(help="Comma-separated.")] = "W1,W2",
    asked: Annotated[
        str, typer.Option("--load", help="As in vllm-saga simulate.")
    ] = "overcommit:2",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions per run.")] = 32,
    machine: Annotated[str, typer.Option("--hardware")] = "llama3-70b-4xa100",
    kv_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    processes: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Run what is missing in `output`, then write the tables and pictures anew."""
    engine = presets.load(machine, kv_tokens)
    output.mkdir(parents=True, exist_ok=True)
    for name in workloads.split(","):
        path = output / f"{name}.json"
        found: Json = json.loads(path.read_text())["arms"] if path.exists() else {}
        trace, source = load(name, traces, sessions)
        workload = WORKLOADS[name]
        full = question(name, trace, loads.parse(asked), engine, sessions)
        config = {
            "workload": name, "title": workload.title, "trace": source, "load": asked,
            "hardware": engine.name, "kv_tokens": engine.kv_tokens, "sessions": sessions,
            "seeds": seeds,
        }  # fmt: skip
        for variant in VARIANTS:
            if variant.title in found:
                continue
            console.rule(f"{name} {workload.title}: {variant.title}")
            arm = replace(full, knobs=variant.knobs)
            jobs = [(arm, variant.policy, seed) for seed in range(seeds)]
            found[variant.title] = _means(run_with_bars(jobs, processes))
            path.write_text(json.dumps({"config": config, "arms": found}, indent=1) + "\n")
    _write(output)
    console.print(f"summary: {output / 'summary.md'}", highlight=False)


def _means(results: Sequence[RunResult]) -> Json:
    """Every column, in the mean of the seeds."""
    runs = [summarise(result) for result in results]
    return {title: fmean(_get(run, keys) for run in runs) for title, keys, _ in COLUMNS}


def _get(run: Mapping[str, Any], keys: Sequence[str]) -> float:
    value: Any = run
    for key in keys:
        value = value[key]
    return float(value)


def _write(output: Path) -> None:
    lines = ["# Ablation", "", "Means over the seeds; differences under 5 % are ties.", ""]
    for path in sorted(output.glob("W*.json")):
        document = json.loads(path.read_text())
        config, arms = document["config"], document["arms"]
        lines += [
            f"## {config['workload']}: {config['title']}, {config['load']}",
            "",
            f"{config['hardware']}, {config['kv_tokens']:,} KV tokens, {config['sessions']} "
            f"sessions per run, {config['seeds']} seeds.",
            "",
            "| | " + " | ".join(title for title, _, _ in COLUMNS) + " | against saga |",
            "|---|" + "---:|" * (len(COLUMNS) + 1),
        ]
        first = COLUMNS[0][0]
        for variant in VARIANTS:
            if variant.title not in arms:
                continue
            arm = arms[variant.title]
            cells = [format(arm[title], spec) for title, _, spec in COLUMNS]
            ratio = arms[DEFAULT.title][first] / arm[first]
            lines.append(f"| {variant.title} | " + " | ".join(cells) + f" | {ratio:.2f}x |")
        picture = output / f"{config['workload']}-patience.png"
        _patience(arms, config, picture)
        lines += ["", f"![patience]({picture.name})", ""]
    (output / "summary.md").write_text("\n".join(lines))


def _patience(arms: Json, config: Json, path: Path) -> None:
    """What `patience` trades, as a curve through its values."""
    shown = {0.5: DEFAULT.title} | {dict(v.knobs)["patience"]: v.title for v in PATIENCE}
    points = [(value, arms[title]) for value, title in sorted(shown.items()) if title in arms]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    xs = [arm["step wait p99, s"] for _, arm in points]
    ys = [arm["task mean, s"] for _, arm in points]
    axes.plot(xs, ys, "o-", color="tab:blue")
    for (value, _), x, y in zip(points, xs, ys, strict=True):
        axes.annotate(f"{value:g}", (x, y), (6, 4), textcoords="offset points")
    axes.set(
        xlabel="p99 step wait, s", ylabel="mean task completion, s",
        title=f"patience: {config['title']}, {config['load']}",
    )  # fmt: skip
    # From 0: what is all but the same shall look so.
    axes.set_xlim(0, 1.2 * max(xs))
    axes.set_ylim(0, 1.2 * max(ys))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
