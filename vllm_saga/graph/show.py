"""Execution graphs as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from vllm_saga.policy.graph import AgentClass
from vllm_saga.policy.toolgraph import ToolNode

_NEXT = 3
_KEY = 40


def seconds(value: float) -> str:
    """Two digits, whatever the size."""
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def tokens(value: float) -> str:
    """A count, with k from 10,000 on."""
    return f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:.0f}"


def summary(key: str, agent: AgentClass) -> str:
    """One line about a class."""
    name = key.removeprefix("/") or "without a full block"
    name = name if len(name) <= _KEY else name[:_KEY] + "…"
    gaps, (growth, variance) = agent.gaps, agent.remaining_growth(0)
    return (
        f"{name}: {agent.remaining_calls(0):.0f} calls, "
        f"gap p50 {seconds(gaps.quantile_s(0.5))}, p95 {seconds(gaps.quantile_s(0.95))}, "
        f"{tokens(agent.growth_tokens)} tokens a call, "
        f"{tokens(growth)} ± {tokens(sqrt(variance))} tokens a workflow"
    )


def tools_by_calls(agent: AgentClass) -> list[tuple[str, ToolNode]]:
    """The nodes of a class, those called most first."""
    return sorted(agent.tools.items(), key=lambda item: (-item[1].calls, item[0]))


def show(agents: Iterable[tuple[str, AgentClass]], console: Console) -> None:
    """Print every class, the one used last first."""
    for key, agent in agents:
        heading = f"[bold]{escape(summary(key, agent))}[/bold]"
        body = _table(agent) if len(agent.tools) else "  no tools known"
        console.print(Group(heading, body, ""), highlight=False)


def _table(agent: AgentClass) -> Table:
    table = Table("tool", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("calls", "gap p50", "gap p95", "growth", "±", "ends", "sure"):
        table.add_column(name, justify="right")
    table.add_column("followed by")
    for name, node in tools_by_calls(agent):
        following = agent.next_tools(name)
        likely = sorted(following, key=lambda other: (-following[other], other))[:_NEXT]
        table.add_row(
            escape(name),
            f"{node.calls:.0f}" if node.calls else "",
            seconds(node.gaps.quantile_s(0.5)) if node.gaps.returns else "",
            seconds(node.gaps.quantile_s(0.95)) if node.gaps.returns else "",
            tokens(node.growth.mean),
            tokens(sqrt(node.growth.variance)),
            f"{agent.tools.p_end(name):.0%}",
            f"{agent.confidence(name):.2f}",
            escape(", ".join(f"{other} {following[other]:.0%}" for other in likely)),
        )
    return table
