"""Numbers, table, JSON and picture of a live benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from benchmarks.live import spread
from benchmarks.live.arrangement import REFERENCE
from benchmarks.live.replay import CallRecord, SessionRecord

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """Everything measured about one arm; times in seconds on the client's clock."""

    scheduler: str
    sessions: list[SessionRecord]
    started: float
    ended: float
    counters: Mapping[str, int]
    block_size: int
    client_cpu_s: float
    server_cpu_s: float
    router_cpu_s: float = 0.0
    replicas: int = 1

    @property
    def calls(self) -> list[CallRecord]:
        return [call for session in self.sessions for call in session.calls]

    @property
    def window_s(self) -> float:
        return self.ended - self.started


def pool(rounds: Sequence[ArmResult]) -> ArmResult:
    """The rounds of one arm as one result: all sessions, counters and times added up."""
    first = rounds[0]
    return replace(
        first,
        sessions=[session for arm in rounds for session in arm.sessions],
        ended=first.started + sum(arm.window_s for arm in rounds),
        counters={key: sum(arm.counters[key] for arm in rounds) for key in first.counters},
        client_cpu_s=sum(arm.client_cpu_s for arm in rounds),
        server_cpu_s=sum(arm.server_cpu_s for arm in rounds),
        router_cpu_s=sum(arm.router_cpu_s for arm in rounds),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics; NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def reprefilled(call: CallRecord, block_size: int) -> int:
    """Tokens the session had computed before and computed again: reusable blocks minus cached."""
    return max(0, call.reusable_tokens // block_size * block_size - call.cached_tokens)


def summarise(arm: ArmResult) -> Json:
    """The `runs[]` entry of one arm. Times in seconds; failed sessions count in `failed` only."""
    done = [session for session in arm.sessions if session.error is None]
    completion = [session.completion_s for session in done]
    waits = [call.ttft_s for call in arm.calls if call.index > 0]
    calls = arm.calls
    prompt = sum(call.prompt_tokens for call in calls)
    cached = sum(call.cached_tokens for call in calls)
    reusable = sum(call.reusable_tokens // arm.block_size * arm.block_size for call in calls)
    wasted = sum(reprefilled(call, arm.block_size) for call in calls)
    run = {
        "scheduler": arm.scheduler,
        "task_completion_s": {
            "mean": mean(completion),
            "p50": percentile(completion, 0.5),
            "p95": percentile(completion, 0.95),
        },
        "step_wait_s": {"mean": mean(waits), "p99": percentile(waits, 0.99)},
        "tasks_per_min": 60 * len(done) / arm.window_s if arm.window_s else math.nan,
        "prefix_hit_rate": cached / prompt if prompt else math.nan,
        "reprefilled_tokens": wasted,
        "preemptions": arm.counters.get("preemptions", 0),
        "failed": len(arm.sessions) - len(done),
        "reuse_efficiency": 1 - wasted / reusable if reusable else math.nan,
        "step_wait_p50_s": percentile(waits, 0.5),
        "worst_step_wait_s": max(waits, default=math.nan),
        "first_step_wait_mean_s": mean([call.ttft_s for call in calls if call.index == 0]),
        "model_s_per_call": mean([call.latency_s for call in calls]),
        "calls": len(calls),
        "window_s": arm.window_s,
        "client_cpu_share": arm.client_cpu_s / arm.window_s if arm.window_s else math.nan,
        "server_cpu_share": arm.server_cpu_s / arm.window_s if arm.window_s else math.nan,
        "engine_prefix_hits": arm.counters.get("prefix_hits", 0),
        "engine_prefix_queries": arm.counters.get("prefix_queries", 0),
        "errors": sorted({session.error for session in arm.sessions if session.error})[:5],
    }  # fmt: skip
    if arm.replicas > 1:
        run |= spread.summarise(arm.sessions, arm.replicas) | {
            "router_cpu_s_per_call": arm.router_cpu_s / len(calls) if calls else math.nan
        }
    return run


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def ratios(runs: Sequence[Json]) -> Json:
    """Stock against SAGA, or where there are routers, each arrangement against `REFERENCE`.

    Above 1 means SAGA is better. Empty unless both arms ran.
    """
    arms = {run["scheduler"]: run for run in runs}
    if REFERENCE in arms:
        return {
            name: compare(run, arms[REFERENCE]) for name, run in arms.items() if name != REFERENCE
        }
    return compare(arms["stock"], arms["saga"]) if {"stock", "saga"} <= arms.keys() else {}


def compare(other: Json, saga: Json) -> Json:
    """How many times better `saga` is."""
    return {
        "task_completion_mean": ratio(
            other["task_completion_s"]["mean"], saga["task_completion_s"]["mean"]
        ),
        "step_wait_mean": ratio(other["step_wait_s"]["mean"], saga["step_wait_s"]["mean"]),
        "tasks_per_min": ratio(saga["tasks_per_min"], other["tasks_per_min"]),
    }


def ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def write_json(path: Path, config: Json, runs: Sequence[Json]) -> None:
    """Write report.json; numbers that do not exist become null."""
    document = {"config": config, "runs": list(runs), "ratios": ratios(runs)}
    path.write_text(json.dumps(_finite(document), indent=2) + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON has not, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


#: Label, how to read it from a run, how to print it.
ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("task completion, mean (s)", ("task_completion_s", "mean"), ".1f"),
    ("task completion, p50 (s)", ("task_completion_s", "p50"), ".1f"),
    ("task completion, p95 (s)", ("task_completion_s", "p95"), ".1f"),
    ("tasks per minute", ("tasks_per_min",), ".2f"),
    ("step wait, mean (s)", ("step_wait_s", "mean"), ".3f"),
    ("step wait, p99 (s)", ("step_wait_s", "p99"), ".3f"),
    ("prefix-cache hit rate", ("prefix_hit_rate",), ".1%"),
    ("re-prefilled tokens", ("reprefilled_tokens",), ",d"),
    ("preemptions", ("preemptions",), ",d"),
    ("failed sessions", ("failed",), "d"),
)
#: The same of arrangements, which are rows and not columns: there are many of them.
REPLICA_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("task (s)", ("task_completion_s", "mean"), ".1f"),
    ("p95 (s)", ("task_completion_s", "p95"), ".1f"),
    ("step wait (s)", ("step_wait_s", "mean"), ".3f"),
    ("p99 (s)", ("step_wait_s", "p99"), ".2f"),
    ("cache hits", ("prefix_hit_rate",), ".1%"),
    ("same replica", ("colocation",), ".1%"),
    ("busiest", ("busiest_share",), ".1%"),
    ("failed", ("failed",), "d"),
)
#: Rows that `ratios` has a number for.
RATIO_ROWS = {
    "task completion, mean (s)": "task_completion_mean",
    "step wait, mean (s)": "step_wait_mean",
    "tasks per minute": "tasks_per_min",
}


def table(runs: Sequence[Json], title: str) -> Table:
    """The side-by-side table."""
    out = Table(title=title, title_justify="left")
    out.add_column("")
    for run in runs:
        out.add_column(label(run["scheduler"]), justify="right")
    gain = ratios(runs)
    if gain:
        out.add_column("better by", justify="right", style="bold")
    for name, keys, form in ROWS:
        cells = [cell(run, keys, form) for run in runs]
        if gain:
            cells.append(f"{gain[RATIO_ROWS[name]]:.2f}x" if name in RATIO_ROWS else "")
        out.add_row(name, *cells)
    return out


def table_of_arrangements(runs: Sequence[Json], title: str) -> Table:
    """The same for several replicas: an arrangement a row, times without a name are means.

    same replica: calls that went where their session's last one was. busiest: share of all calls.
    """
    out = Table(title=title, title_justify="left")
    out.add_column("", no_wrap=True)
    for name, _, _ in REPLICA_COLUMNS:
        out.add_column(name, justify="right", min_width=7)
    out.add_column(f"{REFERENCE} better by", justify="right", style="bold", min_width=9)
    gain = ratios(runs)
    for run in runs:
        arm = run["scheduler"]
        better = f"{gain[arm]['task_completion_mean']:.2f}x" if arm in gain else ""
        out.add_row(arm, *(cell(run, keys, form) for _, keys, form in REPLICA_COLUMNS), better)
    return out


def label(arm: str) -> str:
    return "stock vLLM" if arm == "stock" else arm


def cell(run: Json, keys: Sequence[str], form: str) -> str:
    value: Any = run
    for key in keys:
        value = value[key]
    return "unknown" if value is None else format(value, form)


def picture(path: Path, arms: Sequence[ArmResult], title: str) -> None:
    """PNG: distribution of completion times; share of prompt tokens cached, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"stock": "#b0413e", "saga": "#2a6f97", REFERENCE: "#2a6f97"}
    others = iter(plt.get_cmap("Dark2").colors)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    figure.suptitle(title, fontsize=12)
    for arm in arms:
        colour = colours.get(arm.scheduler) or next(others, "#555555")
        name = label(arm.scheduler)
        times = sorted(session.completion_s for session in arm.sessions if session.error is None)
        if not times:
            continue
        steps = [100 * (k + 1) / len(times) for k in range(len(times))]
        left.step(
            [0, *times],
            [0, *steps],
            where="post",
            color=colour,
            lw=2.2,
            label=f"{name} (mean {fmean(times):.1f} s)",
        )
        x, y = hit_rate_over_time(arm)
        right.plot(
            x,
            [100 * v for v in y],
            color=colour,
            lw=2.2,
            label=f"{name} (done after {arm.window_s:.0f} s)",
        )
    left.set(
        xlabel="task completion time, s",
        ylabel="tasks completed, %",
        ylim=(0, 101),
        title="Task completion",
    )
    right.set(
        xlabel="time since start, s",
        ylabel="prompt tokens from cache, %",
        ylim=(0, 101),
        title="Prefix-cache hits",
    )
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", framealpha=0.9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def hit_rate_over_time(arm: ArmResult, buckets: int = 40) -> tuple[list[float], list[float]]:
    """(seconds since start, share of prompt tokens cached) in equal buckets of the window."""
    width = arm.window_s / buckets if arm.window_s else 1.0
    cached, prompt = [0] * buckets, [0] * buckets
    for call in arm.calls:
        k = min(buckets - 1, max(0, int((call.first_token - arm.started) / width)))
        cached[k] += call.cached_tokens
        prompt[k] += call.prompt_tokens
    points = [((k + 0.5) * width, cached[k] / prompt[k]) for k in range(buckets) if prompt[k]]
    return [x for x, _ in points], [y for _, y in points]
