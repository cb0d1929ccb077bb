"""`vllm-saga graph`: what has been learned of the agents that this engine serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_saga.graph.draw import DrawError, draw
from vllm_saga.graph.show import show as print_classes
from vllm_saga.policy import memory
from vllm_saga.policy.graph import AgentClass, AgentClasses

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

File = Annotated[Path, typer.Argument(help="A graph that an engine saved, or `graph fit` made.")]
Agent = Annotated[
    str | None, typer.Option(help="Only the class whose key holds this (`graph show` names them).")
]


@app.command()
def show(file: File, agent: Agent = None) -> None:
    """Print the tools of each agent class: how often, how long, how much, what follows."""
    print_classes(_chosen(_load(file), agent), Console())


@app.command()
def plot(
    file: File,
    out: Annotated[Path, typer.Argument(help="The picture: .png or .svg.")],
    agent: Agent = None,
) -> None:
    """Draw the graph of one agent class; without --agent of the one with the most calls."""
    chosen = _chosen(_load(file), agent)
    key, found = max(chosen, key=lambda item: sum(node.calls for _, node in item[1].tools.items()))
    try:
        draw(key, found, out)
    except (DrawError, OSError) as error:
        _fail(error)
    _say(f"picture: {out}")


@app.command()
def fit(
    trace: Annotated[str, typer.Argument(help="A trace file, or builtin:NAME.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the graph goes.")],
    sessions: Annotated[
        int | None, typer.Option(min=2, help="Sessions of a built-in workload; default: 100.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a built-in workload.")] = 0,
    test: Annotated[
        float | None,
        typer.Option(min=0.05, max=0.95, help="Share of the sessions, the last ones, to test on."),
    ] = None,
) -> None:
    """Learn a graph from a trace; with --test also say how well it predicts unseen sessions."""
    from vllm_saga.graph.fit import fit as learn
    from vllm_saga.graph.score import score
    from vllm_saga.simulator import formats
    from vllm_saga.simulator.trace import TraceError

    try:
        found = formats.load(trace, sessions, seed)
        split = len(found) - round((test or 0.0) * len(found))
        classes = learn(found[:split])
        out.write_bytes(memory.encode(memory.snapshot(classes)))
    except (TraceError, OSError) as error:
        _fail(error)
    _say(f"{out}: {split} sessions, {len(classes)} classes")
    if test is not None:
        by_tool, by_class = score(classes, found[split:])
        _print_scores(by_tool.means(), by_class.means())


def _print_scores(by_tool: dict[str, float], by_class: dict[str, float]) -> None:
    table = Table("on unseen sessions", "by tool", "by class", box=box.SIMPLE_HEAD)
    for name, meaning, form in (
        ("log_loss", "gap: log loss, nats", ".3f"),
        ("pinball", "gap: quantile loss of p50 and p95, log10 s", ".3f"),
        ("covered", "gap: share within the predicted p95", ".1%"),
        ("growth", "growth: root mean square error, tokens", ".0f"),
        ("hit", "next tool: right at the first guess", ".1%"),
    ):
        table.add_row(meaning, format(by_tool[name], form), format(by_class[name], form))
    Console().print(table)


def _load(file: Path) -> AgentClasses:
    classes = AgentClasses()
    try:
        memory.restore(classes, memory.decode(file.read_bytes()))
    except (memory.GraphError, OSError) as error:
        _fail(f"{file}: {error.strerror if isinstance(error, OSError) else error}")
    return classes


def _chosen(classes: AgentClasses, wanted: str | None) -> list[tuple[str, AgentClass]]:
    """The classes whose key holds `wanted`, the one used last first; all of them without it."""
    found = [(key, agent) for key, agent in classes.items() if wanted is None or wanted in key]
    if not found:
        keys = ", ".join(key for key, _ in classes.items()) or "none"
        _fail(f"no class {wanted!r}; there are: {keys}" if wanted else "the graph holds no class")
    return found[::-1]


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False)


def _fail(error: object) -> NoReturn:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(1) from None
