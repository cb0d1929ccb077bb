"""One frame of `vllm-saga top`, made from an answer of /v1/saga/workflows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STYLES = {
    "held": "bold red",
    "queued": "yellow",
    "running": "bold green",
    "gap": "cyan",
    "presumed_ended": "dim",
}
_STATE_NAMES = {"presumed_ended": "ended?"}
# Field of the pool, how it is called, its sign in the bar, and its style.
_PARTS = (
    ("running_blocks", "running", "█", "green"),
    ("gap_blocks", "in a gap", "▓", "cyan"),
    ("visitor_blocks", "visitors", "▒", "yellow"),
    ("promised_blocks", "next calls", "░", "magenta"),
    ("free_blocks", "free", "·", "dim"),
)
# Columns of a terminal from which on there is room for more.
_WIDE = 110
_NARROW_BAR, _WIDE_BAR = 28, 50
_ID_CHARS, _WIDE_ID_CHARS = 18, 36
_MOST_TENANTS = 8


def frame(overview: Mapping[str, Any], title: str, width: int, rows: int) -> RenderableType:
    """Engines, workflows and tenants for a terminal of `width` columns; `rows` workflows."""
    parts: list[RenderableType] = [_headline(overview, title), _engines(overview, width)]
    parts += [_legend(), ""]
    if overview["workflows"]:
        parts.append(_workflows(overview, width, rows))
    else:
        parts.append(Text("no workflow yet: agents' calls show up here", style="dim"))
    if any(overview["tenants"]):
        parts += ["", _tenants(overview["tenants"])]
    return Group(*parts)


def bar(pool: Mapping[str, int], cells: int) -> Text:
    """Who holds the KV pool, `cells` wide: every part by its share, none lost."""
    whole = max(pool["capacity_blocks"], sum(max(pool[field], 0) for field, *_ in _PARTS), 1)
    drawn = Text()
    done = filled = 0
    for field, _, sign, style in _PARTS:
        done += max(pool[field], 0)
        upto = round(cells * done / whole)
        drawn.append(sign * (upto - filled), style)
        filled = upto
    return drawn.append(" " * (cells - filled))


def seconds(value: float | None) -> str:
    """A span, as short as can be: 4.2s, 75s, 12m, 3h."""
    if value is None:
        return ""
    if value < 10.0:
        return f"{value:.1f}s"
    if value < 600.0:
        return f"{value:.0f}s"
    return f"{value / 60:.0f}m" if value < 6000.0 else f"{value / 3600:.0f}h"


def amount(value: float) -> str:
    """A count: 950, 12.5k, 450k, 3.1M."""
    if value < 10_000:
        return f"{value:.0f}"
    scaled, unit = (value / 1e3, "k") if value < 1e6 else (value / 1e6, "M")
    return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"


def plain(text: object) -> Text:
    """What others have named, without what a terminal would take for a command."""
    return Text("".join(c if c.isprintable() else "?" for c in str(text)))


def shortened(text: object, chars: int) -> Text:
    """`plain`, and no longer than that: the middle goes, for ids differ at their ends."""
    shown = plain(text).plain
    if len(shown) > chars:
        head = chars // 3
        shown = shown[:head] + "…" + shown[len(shown) - (chars - head - 1) :]
    return Text(shown)


def _headline(overview: Mapping[str, Any], title: str) -> Text:
    counts: dict[str, int] = {}
    for engine in overview["engines"]:
        for state, count in engine.get("counts", {}).items():
            counts[state] = counts.get(state, 0) + count
    line = Text.assemble(("saga top", "bold"), "  ", plain(title), "  ")
    for state, style in _STYLES.items():
        if counts.get(state):
            line.append(f"  {counts[state]} {_STATE_NAMES.get(state, state)}", style)
    return line


def _engines(overview: Mapping[str, Any], width: int) -> Table:
    cells = _WIDE_BAR if width >= _WIDE else _NARROW_BAR
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("engine", no_wrap=True)
    for name in ("run", "wait"):
        table.add_column(name, justify="right")
    table.add_column("KV pool", no_wrap=True)
    table.add_column("tokens in use", justify="right", no_wrap=True)
    for engine in overview["engines"]:
        if "error" in engine:
            table.add_row(plain(engine["engine"]), "", "", plain(engine["error"]))
            continue
        pool, calls = engine.get("pool"), (str(engine["running"]), str(engine["waiting"]))
        if pool is None:
            table.add_row(plain(engine["engine"]), *calls, "schedules as stock vLLM does")
            continue
        share = 1.0 - pool["free_blocks"] / max(pool["capacity_blocks"], 1)
        tokens = amount(pool["capacity_blocks"] * pool["block_tokens"])
        used = f"{share:.0%} of {tokens}"
        table.add_row(plain(engine["engine"]), *calls, bar(pool, cells), used)
    return table


def _legend() -> Text:
    line = Text("  ")
    for _, name, sign, style in _PARTS:
        line.append(sign * 2, style).append(f" {name}   ", "dim")
    return line


def _workflows(overview: Mapping[str, Any], width: int, rows: int) -> Table:
    wide, found = width >= _WIDE, overview["workflows"]
    several = len(overview["engines"]) > 1
    chars = _WIDE_ID_CHARS if wide else _ID_CHARS
    tenants = any(workflow["tenant"] for workflow in found)
    table = Table(box=None, pad_edge=False, expand=True, padding=(0, 2 if wide else 1, 0, 0))
    table.add_column("workflow", no_wrap=True)
    if tenants:
        table.add_column("tenant", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("waits for", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("blocks", justify="right", no_wrap=True)
    table.add_column("calls", justify="right", no_wrap=True)
    if wide:
        table.add_column("age", justify="right", no_wrap=True)
        table.add_column("lost", justify="right", no_wrap=True)
        if several:
            table.add_column("engine", no_wrap=True)
    for workflow in found[:rows]:
        style = _STYLES[workflow["state"]]
        cells: list[RenderableType] = [shortened(workflow["id"], chars)]
        if tenants:
            cells.append(shortened(workflow["tenant"], chars // 2))
        cells += [
            Text(_STATE_NAMES.get(workflow["state"], workflow["state"]), style),
            seconds(_since(workflow)),
            _waits_for(workflow, wide),
            _blocks(workflow),
            str(workflow["calls_done"]),
        ]
        if wide:
            cells += [seconds(workflow["age_s"]), amount(workflow["lost_tokens"])]
            if several:
                cells.append(plain(workflow["engine"]))
        table.add_row(*cells)
    more = overview["total"] - min(rows, len(found))
    if more > 0:
        table.add_row(Text(f"… {more} more", "dim"))
    return table


def _since(workflow: Mapping[str, Any]) -> float | None:
    """How long it is in its state, where that is known."""
    cause = workflow["waits_for"]
    since: float | None = cause["held_s"] if cause else workflow["idle_s"]
    return since


def _waits_for(workflow: Mapping[str, Any], wide: bool) -> Text:
    cause = workflow["waits_for"]
    if cause is None:
        state = workflow["state"]
        if state == "queued":
            return Text("a place in vLLM's batch" if wide else "vLLM's batch")
        tool = workflow["tool"]
        return plain(tool) if tool and state in ("gap", "presumed_ended") else Text("")
    if cause["what"] == "step":
        return Text("the next step")
    ahead, short = cause["ahead"], cause["short_blocks"]
    parts = [f"{short} blocks short" if wide else f"{short} short"] if short else []
    parts += [f"{ahead} ahead"] if ahead else []
    if wide:
        parts.append(f"≤ {seconds(cause['runs_within_s'])}")
    return Text(", ".join(parts))


def _blocks(workflow: Mapping[str, Any]) -> Text:
    """What it holds; of one that is held, what it needs."""
    cause = workflow["waits_for"]
    if cause is not None and not workflow["blocks"]:
        return Text(f"({cause['needed_blocks']})", "dim")
    return Text(str(workflow["blocks"]))


def _tenants(tenants: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tenant", no_wrap=True)
    for name in ("weight", "GPU s", "pool s", "waiting"):
        table.add_column(name, justify="right")
    served = sorted(tenants.items(), key=lambda item: -(item[1]["gpu_s"] + item[1]["pool_s"]))
    for name, used in served[:_MOST_TENANTS]:
        table.add_row(
            shortened(name or "(none)", _WIDE_ID_CHARS),
            f"{used['weight']:g}", f"{used['gpu_s']:.1f}", f"{used['pool_s']:.1f}",
            f"{used['waiting']:.0f}",
        )  # fmt: skip
    return table
