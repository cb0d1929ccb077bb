"""The comparison of policies in a terminal, from the document `result.to_json` makes.

Two tables, one row per policy: the numbers, averaged over seeds, and the ratios to the baseline
with their intervals. They fit 100 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_saga.simulator.ratios import is_tie
from vllm_saga.simulator.result import SLO_FACTOR

WIDTH = 100
Format = Callable[[float], str]


def seconds(value: float) -> str:
    """Three digits, whatever the size."""
    for limit, form in ((0.1, ".3f"), (10, ".2f"), (100, ".1f")):
        if value < limit:
            return format(value, form)
    return format(value, ".0f")


def _percent(value: float) -> str:
    return format(100 * value, ".0f")


def _count(value: float) -> str:
    """At most four digits, with k, M or G; a mean below 10 keeps its fraction."""
    for limit, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return format(value / scale, ".0f" if value >= 100 * scale else ".1f") + unit
    return format(value, ".1f" if value < 10 and value % 1 else ".0f")


def _rate(value: float) -> str:
    return format(value, ".2f" if value < 10 else ".1f" if value < 1000 else ".0f")


#: Heading, how to read it from a run, how to print it. Times are seconds.
COLUMNS: tuple[tuple[str, tuple[str, ...], Format], ...] = (
    ("task\nmean", ("task_completion_s", "mean"), seconds),
    ("task\np95", ("task_completion_s", "p95"), seconds),
    ("slow-\ndown", ("slowdown", "mean"), seconds),
    ("wait\nmean", ("step_wait_s", "mean"), seconds),
    ("wait\np99", ("step_wait_s", "p99"), seconds),
    ("SLO\n%", ("slo_attainment",), _percent),
    ("tasks\n/min", ("tasks_per_min",), _rate),
    ("reuse\n%", ("reuse_efficiency",), _percent),
    ("recom-\nputed", ("recomputed_tokens",), _count),
    ("pre-\nempt", ("preemptions",), _count),
    ("not\ndone", ("unfinished",), _count),
)
CAPTION = f"task: completion, s; wait: step wait, s; SLO: done in {SLO_FACTOR} x the time alone"
#: Heading, key in `paired`.
RATIO_COLUMNS = (
    ("task mean", "task_completion_ratio"),
    ("wait mean", "step_wait_mean_ratio"),
    ("wait p99", "step_wait_p99_ratio"),
    ("tasks/min", "tasks_per_min_ratio"),
)
#: Columns left out while they are zero for everybody.
_IF_ANY = ("preemptions", "unfinished")


def show(document: Mapping[str, Any], console: Console | None = None, title: str = "") -> None:
    """Print both tables; without a console of the caller's, at least `WIDTH` columns wide."""
    if console is None:
        console = Console()
        console.width = max(console.width, WIDTH)
    console.print(table(document, title))
    if document["paired"]:
        console.print()
        console.print(ratio_table(document))


def table(document: Mapping[str, Any], title: str = "") -> Table:
    """One row per policy, means over seeds; after the first column its ratio to the baseline."""
    arms = _arms(document)
    gains = {pair["policy"]: pair["task_completion_ratio"] for pair in document["paired"]}
    values = {
        policy: [_average(runs, keys) for _, keys, _ in COLUMNS] for policy, runs in arms.items()
    }
    shown = [
        k
        for k, (_, keys, _) in enumerate(COLUMNS)
        if keys[0] not in _IF_ANY or any(row[k] for row in values.values())
    ]
    out = _frame(title)
    for k in shown:
        out.add_column(COLUMNS[k][0], justify="right", no_wrap=True)
        if k == 0 and gains:
            out.add_column("vs\nbase", justify="right", no_wrap=True)
    for policy, row in values.items():
        cells = [_cell(row[k], COLUMNS[k][2]) for k in shown]
        if gains:
            cells.insert(1, _gain(gains[policy]) if policy in gains else "base")
        out.add_row(Text(policy), *cells, style=_style(policy, gains))
    seeds = len({run["seed"] for run in document["runs"]})
    out.caption = CAPTION + (f"; means of {seeds} seeds" if seeds > 1 else "")
    return out


def ratio_table(document: Mapping[str, Any]) -> Table:
    """One row per policy but the baseline: every ratio with its 95 % interval."""
    pairs: Sequence[Mapping[str, Any]] = document["paired"]
    out = _frame(f"Better than {pairs[0]['baseline']} by (95 % interval); below 1 is worse")
    out.caption = "≈ a tie: the difference is under 5 %.  ? the interval holds 1."
    for heading, _ in RATIO_COLUMNS:
        out.add_column(heading, justify="right", no_wrap=True)
    gains = {pair["policy"]: pair["task_completion_ratio"] for pair in pairs}
    for pair in pairs:
        cells = [_gain(pair[key]) + _interval(pair[key]) for _, key in RATIO_COLUMNS]
        out.add_row(Text(pair["policy"]), *cells, style=_style(pair["policy"], gains))
    return out


def _frame(title: str) -> Table:
    out = Table(
        title=Text(title, style="table.title") if title else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    out.add_column("policy", overflow="fold", min_width=10)
    return out


def _arms(document: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        out.setdefault(run["policy"], []).append(run)
    return out


def _average(runs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> float | None:
    """Mean over the runs that have the number; None if none has."""
    found = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value[key]
        if value is not None:
            found.append(value)
    return fmean(found) if found else None


def _cell(value: float | None, form: Format) -> str:
    return "-" if value is None else form(value)


def _gain(ratio: Mapping[str, Any]) -> str:
    mean = ratio["mean"]
    if mean is None:
        return "-"
    low, high = ratio["ci95"]
    unsure = low is not None and low <= 1 <= high
    mark = "≈" if is_tie(mean) else "?" if unsure else ""
    return f"{mark}{_times(mean)}"


def _interval(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["ci95"]
    return "" if low is None else f" ({_times(low)}-{_times(high)})"


def _times(ratio: float) -> str:
    return format(ratio, ".2f" if ratio < 10 else ".1f" if ratio < 100 else ".0f")


def _style(policy: str, gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Green for clearly better, red for clearly worse mean completion."""
    mean = gains[policy]["mean"] if policy in gains else None
    if mean is None or _gain(gains[policy])[0] in "≈?":
        return ""
    return "green" if mean > 1 else "red"
