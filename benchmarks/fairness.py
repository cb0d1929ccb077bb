"""Ten tenants on one engine, and what becomes of nine when one of them bursts.

    .venv/bin/python -m benchmarks.fairness --output results/fairness [--burst light-1,heavy-1]

The built-in ten-tenant mix arrives at a share of what stock vLLM can carry; then again with a
further stream, three times as large, from one tenant: what the other nine send stays the same,
session for session. On time is a session that takes at most 1.5 times its seconds alone on an idle
engine. `vllm-roomy` is the reference with a KV pool that holds everything: there only the batch
makes sessions slow. Tenants' figures pool the sessions of all seeds.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table

from benchmarks.options import listed
from vllm_saga.simulator import load as loads
from vllm_saga.simulator import plots, presets, result, runner
from vllm_saga.simulator.builtin import tenants
from vllm_saga.simulator.command import run_with_bars, searched
from vllm_saga.simulator.hardware import Hardware
from vllm_saga.simulator.policies import ROOMY
from vllm_saga.simulator.result import RunResult
from vllm_saga.simulator.trace import Session

#: A stream of sessions that no seed of a run is likely to name.
_FURTHER = 1_000_003
#: Key, heading, format.
COLUMNS = (
    ("slo", "on\ntime", ".1%"), ("slo_others", "others", ".1%"),
    ("slo_worst", "worst\ntenant", ".1%"), ("jain", "Jain,\nslowdown", ".3f"),
    ("slowdown", "slow-\ndown", ".2f"), ("slowdown_others", "others", ".2f"),
    ("completion_s", "task\nmean, s", ".0f"),
)  # fmt: skip

Json = dict[str, Any]
console = Console()


def main(
    output: Annotated[Path, typer.Option(help="Results folder.")] = Path("results/fairness"),
    policies: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "vllm,saga-paper,thunderagent,saga",
    burst: Annotated[
        str, typer.Option(help="Tenants that burst in turn, comma-separated.")
    ] = "heavy-1",
    times: Annotated[int, typer.Option(min=2, help="A burst is so many times as much.")] = 4,
    percent: Annotated[
        float, typer.Option(min=1.0, help="Load in % of stock's own saturation.")
    ] = 80.0,
    rate: Annotated[
        float | None, typer.Option(help="Load in sessions/min instead; nothing is searched.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions per run, bursts aside.")] = 64,
    machine: Annotated[str, typer.Option("--hardware")] = "llama3-70b-4xa100",
    kv_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    processes: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Run the mix as it is and with each burst; print tables, write JSON and a picture."""
    engine = presets.load(machine, kv_tokens)
    mix = [tenant.name for tenant in tenants.TENANTS]
    for name in listed(burst):
        if name not in mix:
            raise typer.BadParameter(f"--burst: {name!r} is no tenant; there are {', '.join(mix)}")
    output.mkdir(parents=True, exist_ok=True)
    arms = [ROOMY, *listed(policies)]
    notes: dict[str, float] = {}
    if rate is None:
        rate, notes = _found_rate(engine, sessions, percent, processes)
    config = {
        "hardware": engine.name, "kv_tokens": engine.kv_tokens, "rate_per_min": rate, **notes,
        "sessions": sessions, "seeds": seeds, "times": times,
    }  # fmt: skip
    document: Json = {"config": config, "cases": {}}
    for name in ["", *listed(burst)]:
        console.rule(f"{name} x{times}" if name else "ten tenants")
        works = [work(sessions, seed, rate, name, times) for seed in range(seeds)]
        jobs = [_job(engine, arm, works[seed], seed) for arm in arms for seed in range(seeds)]
        runs = run_with_bars(jobs, processes)
        case = {
            arm: summary(runs[number * seeds : (number + 1) * seeds], name)
            for number, arm in enumerate(arms)
        }
        document["cases"][f"{name} x{times}" if name else "even"] = case
        show(case)
        (output / "fairness.json").write_text(json.dumps(document, indent=1) + "\n")
        draw(document["cases"], output / "fairness.png")
    console.print(f"all figures: {output / 'fairness.json'}", highlight=False)


def work(
    count: int, seed: int, rate_per_min: float, burst: str = "", times: int = 4
) -> tuple[Session, ...]:
    """`count` sessions of the mix at a mean rate; `burst` sends `times` as much, of its own.

    Whoever bursts, the first `count` sessions are the same and arrive at the same times, from 0 on.
    """
    own = tenants.sessions(count, seed)
    began, ended = own[0].arrival_s or 0.0, own[-1].arrival_s or 0.0
    for number in range(1, times if burst else 1):
        further = tenants.sessions(2 * count, seed + number * _FURTHER)
        own += [
            session
            for session in further
            if session.tenant == burst and began <= (session.arrival_s or 0.0) <= ended
        ]
    scale = 60 / rate_per_min * (count - 1) / (ended - began)
    return tuple(
        msgspec.structs.replace(session, arrival_s=((session.arrival_s or 0.0) - began) * scale)
        for session in own
    )


def summary(runs: Sequence[RunResult], burst: str = "") -> Json:
    """What one policy did: over all sessions, over those of tenants that did not burst, by tenant.

    `jain` is over the tenants' mean slowdowns. All sessions have to be finished.
    """
    slow: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for session in run.sessions:
            slow[session.tenant].append(result.slowdown(run, session) or math.inf)
    took = [t for run in runs for s in run.sessions if (t := result.completion_s(s)) is not None]
    by_tenant = {
        name: {"slo": _on_time(own), "slowdown": fmean(own), "sessions": len(own)}
        for name, own in sorted(slow.items())
    }
    others = {name: own for name, own in slow.items() if name != burst}
    every, calm = (list(itertools.chain(*part.values())) for part in (slow, others))
    means = [tenant["slowdown"] for tenant in by_tenant.values()]
    return {
        "slo": _on_time(every),
        "slo_others": _on_time(calm),
        "slo_worst": min(by_tenant[name]["slo"] for name in others),
        "slo_by_seed": [result.summarise(run)["slo_attainment"] for run in runs],
        "jain": sum(means) ** 2 / (len(means) * sum(x * x for x in means)),
        "slowdown": fmean(every),
        "slowdown_others": fmean(calm),
        "completion_s": fmean(took),
        "tenants": by_tenant,
        "wall_s": [round(run.wall_s) for run in runs],
    }


def show(case: Mapping[str, Json]) -> None:
    """One row for each policy."""
    table = Table(
        Column("policy", no_wrap=True), caption="others, worst tenant: without the one that bursts"
    )
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for policy, figures in case.items():
        table.add_row(policy, *(format(figures[key], form) for key, _, form in COLUMNS))
    console.print(table)


def draw(cases: Mapping[str, Mapping[str, Json]], path: Path) -> None:
    """Bars of mean slowdown by tenant and policy, one row for each case."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(12, 3.2 * len(cases)), layout="constrained")
    rows = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axes, (name, case) in zip(rows, cases.items(), strict=True):
        names = sorted({tenant for figures in case.values() for tenant in figures["tenants"]})
        width = 0.8 / len(case)
        others = (colour for colour in plots.PALETTE * len(case))
        for number, (policy, figures) in enumerate(case.items()):
            colour = plots.FIXED.get(policy) or next(others)
            found = [figures["tenants"].get(tenant, {}).get("slowdown", 0.0) for tenant in names]
            places = [place + (number - len(case) / 2 + 0.5) * width for place in range(len(names))]
            axes.bar(places, found, width, color=colour, label=policy)
        axes.axhline(result.SLO_FACTOR, color="black", lw=1, ls="--")
        axes.set_xticks(range(len(names)), names)
        axes.set(yscale="log", ylim=(1.0, None), ylabel="mean slowdown", title=name)
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3, axis="y")
    figure.legend(*rows[0].get_legend_handles_labels(), ncols=6, loc="outside lower center")
    figure.savefig(path, dpi=plots.DPI)


def _found_rate(
    engine: Hardware, count: int, percent: float, processes: int
) -> tuple[float, dict[str, float]]:
    """Sessions per minute at `percent` of stock's saturation, which has to be measured."""
    asked = loads.AutoOpen(percent)
    mix = tuple(tenants.sessions(2 * count))
    _, _, notes = searched(runner.Experiment(mix, asked, engine, count), [], processes)
    return notes["saturation_per_min"] * percent / 100, notes


def _job(engine: Hardware, arm: str, works: tuple[Session, ...], seed: int) -> runner.Job:
    return runner.Experiment(works, loads.Open(trace=True), engine, len(works)), arm, seed


def _on_time(slowdowns: Sequence[float]) -> float:
    return fmean(value <= result.SLO_FACTOR for value in slowdowns)


if __name__ == "__main__":
    typer.run(main)
