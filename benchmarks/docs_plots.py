"""The pictures of README and docs/, from the results that are committed in benchmarks/results.

    .venv/bin/python -m benchmarks.docs_plots [--output docs/pictures]

Nothing is simulated here, but for the line of two tenants in `fair-share`, which is the policy's
own (`policy/fairness.py`) on a made-up queue. Each picture names the digest of what it was drawn
from, so that a test finds those which results have outgrown (`tests/docs/test_pictures.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeVar

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from vllm_saga.policy.fairness import FairShare
from vllm_saga.simulator.plots import ACCENT, FIXED, GREY, MEMORY, PALETTE

RESULTS = Path(__file__).with_name("results")
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
LOADS = ("0.75", "1.0", "1.5", "2.0")
NAMES = {"vllm": "stock vLLM", "thunderagent": "ThunderAgent", "saga": "saga"}
COLOURS = {**FIXED, "thunderagent": PALETTE[0]}
#: Which arms of the ablation show what a mechanism is worth, and what each is called.
ABLATIONS = {
    "identity": {
        "saga": "ids and tool names", "no session ids (lineage)": "no ids: lineage",
        "no tool names": "no tool names",
    },
    "residency": {
        "stock vLLM": "stock vLLM", "no residency (nothing is held)": "saga that holds nothing",
        "saga": "saga",
    },
    "order": {
        "saga": "short first (10)", "oldest first (short_first 0)": "oldest first (0)",
        "told the future (offline bound)": "told the future",
    },
    "giving-way": {
        "patience 0": "patience 0", "patience 0.25": "patience 0.25", "saga": "patience 0.5",
        "patience 0.75": "patience 0.75", "patience 1": "patience 1",
        "give up at P(return) < 0.4": "give up at 0.4, not 0.1",
    },
    "retention": {
        "stock's order of eviction": "stock", "eviction: LRU of contexts": "lru",
        "eviction: WA-LRU and TTL": "wa-lru", "eviction: Continuum's TTL": "continuum",
        "saga": "value",
    },
    "hints": {
        "saga": "no hints", "right hints": "right hints",
        "wrong hints, shuffled tools": "wrong hints", "told the future (offline bound)": "oracle",
    },
}  # fmt: skip
_TENANTS = {"steady": 1, "burst": 4}
_WINDOW_S = 60.0

Json = dict[str, Any]
V = TypeVar("V")


def main(output: Annotated[Path, typer.Option(help="Where the pictures go.")] = PICTURES) -> None:
    """Draw all pictures anew."""
    output.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "vllm-saga"
    for name, draw in PICTURE_OF.items():
        figure, drawn_from = draw()
        metadata = {"Date": None, "Description": digest(drawn_from)}
        figure.savefig(output / f"{name}.svg", metadata=metadata)
        typer.echo(output / f"{name}.svg")


def digest(drawn_from: Any) -> str:
    """What stands in a picture for the figures that it shows."""
    text = json.dumps(drawn_from, sort_keys=True)
    return f"drawn from {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def overcommit() -> tuple[Figure, Any]:
    """The front page's: task completion and step wait against overcommit."""
    keys = {"completion": "task_completion_s/mean", "wait": "step_wait_s/mean"}
    keys["p99"] = "step_wait_s/p99"
    data = {
        policy: {
            name: [average("W1", load, policy, key) for load in LOADS] for name, key in keys.items()
        }
        for policy in NAMES
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    loads = [float(load) for load in LOADS]
    for policy, values in data.items():
        style: Json = {"color": COLOURS[policy], "marker": "o", "ms": 4, "lw": 2.2}
        left.plot(loads, values["completion"], label=NAMES[policy], **style)
        right.plot(loads, values["wait"], label=f"{NAMES[policy]}, mean", **style)
        right.plot(loads, values["p99"], ls=":", **{**style, "lw": 1.4, "label": "p99"})
    left.set(title="Mean task completion, s", xlabel="live agents' KV / KV pool")
    right.set(title="Step wait, s: mean, and p99 (dotted)", xlabel="live agents' KV / KV pool")
    for axes in (left, right):
        _logarithmic(axes)
        axes.grid(alpha=0.3)
    left.legend()
    return figure, data


def memory() -> tuple[Figure, Any]:
    """What the KV pool was used for at overcommit 2."""
    parts = {
        "running": "running", "held_hit": "cached, used again",
        "held_wasted": "cached, not used again", "free": "free",
    }  # fmt: skip
    colours = [PALETTE[0], PALETTE[3], "#F0C9A8", MEMORY["free"]]
    names = ("vllm", "kvflow", "continuum", "thunderagent", "saga")
    data = {
        workload: {
            name: [average(workload, "2.0", name, f"kv_time/{part}") for part in parts]
            for name in names
        }
        for workload in ("W1", "W2", "W3")
    }
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, workload, shares in _panels(figure, data):
        left = [0.0] * len(names)
        for number, title in enumerate(parts.values()):
            widths = [100 * share[number] for share in shares.values()]
            axes.barh(list(shares), widths, left=left, color=colours[number], label=title)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set(title=f"{workload}, overcommit 2", xlabel="% of the KV pool x time", xlim=(0, 100))
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    return figure, data


def waits() -> tuple[Figure, Any]:
    """Quantiles of the step wait at overcommit 2: who waits longest, and how long."""
    quantiles = ("p50", "p95", "p99", "max")
    data = {
        workload: {
            policy: [average(workload, "2.0", policy, f"step_wait_s/{q}") for q in quantiles]
            for policy in NAMES
        }
        for workload in ("W1", "W2", "W3")
    }
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, workload, values in _panels(figure, data):
        for number, (policy, seconds) in enumerate(values.items()):
            places = [place + 0.27 * (number - 1) for place in range(len(quantiles))]
            axes.bar(places, seconds, 0.25, color=COLOURS[policy], label=NAMES[policy])
        axes.set_xticks(range(len(quantiles)), quantiles)
        axes.set(title=f"{workload}, overcommit 2")
        _logarithmic(axes)
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    figure.supylabel("step wait, s", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return figure, data


def ablation(mechanism: str) -> Callable[[], tuple[Figure, Any]]:
    """Bars of the arms that show a mechanism; saga as it is stands out."""

    def draw() -> tuple[Figure, Any]:
        document = json.loads((RESULTS / "ablation" / "W1.json").read_text())
        titles = ABLATIONS[mechanism]
        keys = ("task mean, s", "step wait mean, s", "step wait p99, s")
        data = {title: [document["arms"][title][key] for key in keys] for title in titles}
        figure = Figure(figsize=(9, 0.32 * len(titles) + 0.9), layout="constrained")
        colours = [ACCENT if title == "saga" else GREY for title in titles]
        for number, axes in enumerate(figure.subplots(1, len(keys), sharey=True)):
            values = [arm[number] for arm in data.values()]
            bars = axes.barh(list(titles.values()), values, color=colours, height=0.7)
            axes.bar_label(bars, fmt="{:.3g}" if number else "{:.0f}", padding=3, fontsize=9)
            axes.set(xlim=(0, 1.22 * max(values)))
            axes.set_title(keys[number], fontsize=10)
            axes.tick_params(axis="x", labelsize=8)
        axes.invert_yaxis()
        return figure, data

    return draw


def fair_share() -> tuple[Figure, Any]:
    """Two tenants before one engine; the second sends four times as much for a while."""
    lines = {
        "first come, first served": _serve(lambda waiting, share, now: waiting[0]),
        "Agent Fair Share": _serve(lambda waiting, share, now: share.first(now)),
    }
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, title, waited in _panels(figure, lines):
        for tenant, colour in zip(_TENANTS, (PALETTE[0], ACCENT), strict=True):
            own = [(came, wait) for name, came, wait in waited if name == tenant]
            axes.plot(*zip(*own, strict=True), ".", ms=4, color=colour, label=tenant)
        axes.axvspan(200, 400, color=MEMORY["free"], zorder=0)
        axes.set(title=title, xlabel="came at, s")
        axes.grid(alpha=0.3)
    axes.set_ylim(0, None)
    figure.supylabel("waited, s", fontsize=10)
    axes.legend()
    return figure, lines


def _serve(choose: Callable[[list[str], FairShare, float], str]) -> list[tuple[str, float, float]]:
    """(tenant, came at, waited) of workflows of 5 s each that an engine serves one at a time.

    Both tenants send one every 12 s; from 200 to 400 s the second sends four times as many.
    """
    arrivals = sorted(
        (when + offset, tenant)
        for offset, (tenant, times) in enumerate(_TENANTS.items())
        for start, stop, every in ((0, 200, 12), (200, 400, 12 / times), (400, 800, 12))
        for when in (start + every * n for n in range(int((stop - start) / every)))
    )
    share = FairShare(window_s=_WINDOW_S)
    waiting: list[str] = []
    came = {f"{tenant} {when:g}": (tenant, when) for when, tenant in arrivals}
    todo, served, now = list(came), [], 0.0
    while todo or waiting:
        if not waiting:
            now = max(now, came[todo[0]][1])
        while todo and came[todo[0]][1] <= now:
            tenant, when = came[todo[0]]
            share.arrive(tenant, todo[0], when, when)
            waiting.append(todo.pop(0))
        chosen = choose(waiting, share, now)
        waiting.remove(chosen)
        share.leave(chosen)
        tenant, when = came[chosen]
        served.append((tenant, when, now - when))
        share.charge(tenant, 5.0, 0.0, now)
        now += 5.0
    return served


def average(workload: str, load: str, policy: str, path: str) -> float:
    """A figure of a policy at a point of the sweep, in the mean of its seeds."""
    values: list[Any] = [run for run in _runs(workload, load) if run["policy"] == policy]
    for key in path.split("/"):
        values = [value[key] for value in values]
    return fmean(values)


@cache
def _runs(workload: str, load: str) -> list[Json]:
    point = RESULTS / "sweep" / "points" / f"{workload}-overcommit-{load}.json"
    runs: list[Json] = json.loads(point.read_text())["runs"]
    return runs


def _panels(figure: Figure, data: Mapping[str, V]) -> Iterable[tuple[Axes, str, V]]:
    """A panel for each entry, side by side on one scale."""
    axes = figure.subplots(1, len(data), sharey=True)
    return zip(axes, data.keys(), data.values(), strict=True)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


PICTURE_OF: dict[str, Callable[[], tuple[Figure, Any]]] = {
    "overcommit": overcommit,
    "memory": memory,
    "waits": waits,
    "fair-share": fair_share,
    **{mechanism: ablation(mechanism) for mechanism in ABLATIONS},
}

if __name__ == "__main__":
    typer.run(main)
