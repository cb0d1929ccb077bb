"""Pictures of finished runs, as PNG files.

matplotlib is optional at run time: it is imported when a picture is drawn, and only its Agg
canvas, so that neither a display nor anybody's global backend is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vllm_saga.simulator.ratios import percentile
from vllm_saga.simulator.report import seconds
from vllm_saga.simulator.result import RunResult, by_policy, completion_s, step_waits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT = "#D55E00"
GREY = "#7F7F7F"
#: Policies that look the same in every picture; stock vLLM goes by either name.
FIXED = {"saga": ACCENT, "vllm": GREY, "stock": GREY}
#: Okabe and Ito's and Tol's colours, which colour-blind readers tell apart, less those near ACCENT.
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#332288", "#999933")
DASHES = ("-", "--", ":", "-.")
MEMORY = {"running": "#0072B2", "cached, may be evicted": "#A6D3EE", "free": "#E8E8E8"}

#: More policies than this, and the legend stands beside the picture.
LEGEND_INSIDE = 6
#: Times of 0 are drawn here on a logarithmic axis, seconds.
SHORTEST_S = 1e-3
DPI = 130
_CURVE_POINTS = 1000
_TIME_BUCKETS = 300


class PlotError(RuntimeError):
    """A picture cannot be drawn; the message says what is missing."""


def plot(results: Sequence[RunResult], directory: Path | str, *, title: str = "") -> list[Path]:
    """Draw the four pictures of a comparison; returns the files written.

    completion_cdf.png, step_wait_cdf.png: seeds pooled; what did not finish keeps its curve below
    100 %. kv_memory.png: the lowest seed of each policy. means.png: mean over seeds, with their
    range. title: stands above each. PlotError without matplotlib or without runs; OSError if a file
    cannot be written.
    """
    if not results:
        raise PlotError("nothing to plot: there are no runs")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arms = by_policy(results)
    pictures = {
        "completion_cdf.png": _completion_cdf(arms),
        "step_wait_cdf.png": _step_wait_cdf(arms),
        "kv_memory.png": _kv_memory(arms),
        "means.png": _means(arms),
    }
    for name, figure in pictures.items():
        figure.suptitle(title)
        figure.savefig(directory / name, dpi=DPI)
    return [directory / name for name in pictures]


def collapse_curve(
    points: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    path: Path | str,
    *,
    load_label: str = "load",
    title: str = "",
) -> None:
    """Draw throughput and mean completion against load, one curve per policy.

    points: policy → (load, `result.summarise` of a run at that load); several runs at one load are
    averaged. load_label: the load's name and unit. PlotError without matplotlib or without points.
    """
    if not any(points.values()):
        raise PlotError("nothing to plot: there are no points")
    figure = _figure(12, 4.8)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    styles = _styles(list(points))
    for policy, own in points.items():
        for axes, keys in (
            (left, ("tasks_per_min",)),
            (right, ("task_completion_s", "mean")),
        ):
            loads, values = _curve(own, keys)
            axes.plot(loads, values, marker="o", ms=4, label=policy, **styles[policy])
    left.set(xlabel=load_label, ylabel="tasks per minute", title="Throughput", ylim=(0, None))
    right.set(xlabel=load_label, ylabel="mean task completion, s", title="Task completion")
    _logarithmic(right, "y")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _legend(figure, right, len(points))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "pictures need matplotlib: pip install matplotlib (or this package's extra 'plot')"
        ) from error
    # A Figure that pyplot does not know is drawn by Agg and leaves no state behind.
    return Figure(figsize=(width, height), layout="constrained")


def _styles(policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line style of each policy: `FIXED`, the others by their given order."""
    others = [policy for policy in policies if policy not in FIXED]
    out: dict[str, dict[str, Any]] = {}
    for policy in policies:
        if policy in FIXED:
            out[policy] = {"color": FIXED[policy], "lw": 2.6, "ls": "-", "zorder": 5}
            continue
        turn, colour = divmod(others.index(policy), len(PALETTE))
        out[policy] = {
            "color": PALETTE[colour],
            "lw": 1.6,
            "ls": DASHES[turn % len(DASHES)],
            "zorder": 3,
        }
    return out


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers (0.5, 20, 100) at its ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, policies: int) -> None:
    if policies > LEGEND_INSIDE:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
    else:
        axes.legend(framealpha=0.9)


def _completion_cdf(arms: Mapping[str, Sequence[RunResult]]) -> Figure:
    curves = {}
    for policy, runs in arms.items():
        sessions = [session for run in runs for session in run.sessions]
        took = [value for session in sessions if (value := completion_s(session)) is not None]
        curves[policy] = (took, len(sessions))
    return _cdf(curves, "task completion time, s", "tasks completed, %", "Task completion")


def _step_wait_cdf(arms: Mapping[str, Sequence[RunResult]]) -> Figure:
    curves = {}
    for policy, runs in arms.items():
        waits = [value for run in runs for value in step_waits(run.sessions)]
        calls = sum(call.index > 0 for run in runs for call in run.calls)
        curves[policy] = (waits, calls)
    title = "Step wait: from issue to first token, all calls but each session's first"
    return _cdf(curves, "step wait, s", "calls answered, %", title)


def _cdf(
    curves: Mapping[str, tuple[Sequence[float], int]], xlabel: str, ylabel: str, title: str
) -> Figure:
    """curves: policy → (values, number of values there would be had everything finished)."""
    figure = _figure(9, 5)
    axes = figure.subplots()
    styles = _styles(list(curves))
    for policy, (values, total) in curves.items():
        mean = f"{seconds(fmean(values))} s" if values else "none"
        x = np.maximum(np.sort(np.asarray(values, dtype=float)), SHORTEST_S)
        y = 100 * np.arange(1, len(x) + 1) / max(total, 1)
        if len(x):
            kept = np.unique(np.linspace(0, len(x) - 1, _CURVE_POINTS).astype(int))
            x, y = np.append(x[0], x[kept]), np.append(0.0, y[kept])
        axes.step(x, y, where="post", label=f"{policy} (mean {mean})", **styles[policy])
    _logarithmic(axes, "x")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(0, 101))
    axes.grid(alpha=0.3, which="major")
    _legend(figure, axes, len(curves))
    return figure


def _kv_memory(arms: Mapping[str, Sequence[RunResult]]) -> Figure:
    """Small multiples on one time axis: how much of the pool was running, cached, free."""
    columns = min(4, max(1, math.ceil(math.sqrt(len(arms)))))
    rows = math.ceil(len(arms) / columns)
    figure = _figure(3.4 * columns + 2.2, 2.3 * rows + 0.6)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (policy, runs) in zip(grid.flat, arms.items(), strict=False):
        run = runs[0]
        times, running, cached = memory_over_time(run)
        areas = axes.stackplot(
            times,
            running,
            cached,
            np.maximum(100 - running - cached, 0),
            colors=list(MEMORY.values()),
            lw=0,
        )
        for area, name in zip(areas, MEMORY, strict=True):
            area.set_label(name)
        colour = ACCENT if policy == "saga" else "black"
        axes.set_title(policy, fontsize=10, color=colour)
        axes.set(ylim=(0, 100), xlim=(0, None))
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(arms))
        # The lowest picture of a column has the numbers, wherever it stands.
        axes.tick_params(labelbottom=number + columns >= len(arms))
    figure.supxlabel("virtual time, s", fontsize=10)
    figure.supylabel("share of the KV pool, %", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def memory_over_time(run: RunResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(middle of bucket in s, running, cached), in % of the pool, averaged over equal buckets.

    Empty arrays if the run has no timeline or took no time.
    """
    if not run.timeline or run.ended_s <= 0 or run.kv_capacity_token_s <= 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    pool = run.kv_capacity_token_s / run.ended_s
    samples = np.array(run.timeline, dtype=float)
    times = np.append(samples[:, 0], run.ended_s)
    edges = np.linspace(0, run.ended_s, _TIME_BUCKETS + 1)
    shares = []
    for column in (1, 2):
        # A step function's integral is piecewise linear: interpolating it averages exactly.
        area = np.append(0.0, np.cumsum(samples[:, column] * np.diff(times)))
        shares.append(100 * np.diff(np.interp(edges, times, area)) / np.diff(edges) / pool)
    return (edges[:-1] + edges[1:]) / 2, shares[0], shares[1]


def _means(arms: Mapping[str, Sequence[RunResult]]) -> Figure:
    """Bars: mean completion and p99 step wait, mean over seeds, lines from lowest to highest."""
    figure = _figure(11, 0.36 * len(arms) + 1.6)
    styles = _styles(list(arms))
    numbers = {
        "mean task completion, s": [
            [_mean([t for s in run.sessions if (t := completion_s(s)) is not None]) for run in runs]
            for runs in arms.values()
        ],
        "p99 step wait, s": [
            [percentile(sorted(step_waits(run.sessions)), 0.99) for run in runs]
            for runs in arms.values()
        ],
    }
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(arms))
    for axes, (label, by_arm) in zip((left, right), numbers.items(), strict=True):
        found = [[value for value in seeds if math.isfinite(value)] for seeds in by_arm]
        means = [fmean(seeds) if seeds else 0.0 for seeds in found]
        axes.barh(places, means, height=0.7, color=[style["color"] for style in styles.values()])
        for place, seeds, mean in zip(places, found, means, strict=True):
            end = max(seeds, default=0.0)
            if len(seeds) > 1:
                axes.plot([min(seeds), end], [place, place], color="black", lw=1)
            text = seconds(mean) if seeds else "none"
            axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center")
        longest = max((max(seeds) for seeds in found if seeds), default=0.0)
        axes.set(xlabel=label, xlim=(0, 1.15 * longest or 1.0))
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    left.set_yticks(places, list(arms))
    left.invert_yaxis()
    if any(len(runs) > 1 for runs in arms.values()):
        figure.supxlabel("bar: mean of the seeds; line: lowest to highest seed", fontsize=9)
    return figure


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _curve(
    points: Sequence[tuple[float, Mapping[str, Any]]], keys: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Loads in ascending order, and the mean of one number over the runs at each."""
    found: dict[float, list[float]] = {}
    for load, summary in points:
        value: Any = summary
        for key in keys:
            value = value[key]
        if value is not None:
            found.setdefault(load, []).append(value)
    loads = sorted(found)
    return loads, [fmean(found[load]) for load in loads]
