"""A class's execution graph as a picture.

matplotlib is optional at run time, and imported when a picture is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_saga.graph.show import seconds, summary, tools_by_calls
from vllm_saga.policy.graph import AgentClass
from vllm_saga.policy.toolgraph import START, Edge, joined_tools

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import FancyBboxPatch

Place = tuple[float, float]

END = "(end)"
MAX_TOOLS = 20
#: Arrows of less than this probability are left out, and numbers on arrows of less than that.
LEAST, LEAST_LABELLED = 0.06, 0.15
#: Nor are tools drawn that are called less often than this share of calls.
RARE = 0.003
DPI = 130
_ARROW, _PARALLEL = "#0072B2", "#D55E00"
_TOOL, _JOIN, _ENDS = "#DCEBF5", "#FBE3D3", "#E8E8E8"
_FORMATS = (".png", ".svg")
_NAME, _LONG_NAME = 24, 16
_LEGEND = (
    "box: median / p95 of the gap after the tool, and how often it follows itself;  arrow: how "
    "often one follows the other;  dashed: tools called in parallel, and the node that joins them"
)
_WIDTH, _HEIGHT, _LINE = 0.27, 0.125, 0.036
_RADII = (1.12, 0.98)
_BEND = 0.12


class DrawError(ValueError):
    """A picture that cannot be drawn; the message says why."""


def draw(key: str, agent: AgentClass, path: Path) -> None:
    """Draw the tools of a class, the 20 called most: arrows as wide as they are probable.

    A box names its tool, the gap after it (median / p95) and how often it follows itself. Arrows to
    and from tools called in parallel are dashed, and meet in the node that joins them.

    Raises:
        DrawError: no matplotlib, no tools, or neither .png nor .svg. OSError: cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise DrawError(f"{path}: a picture is one of {', '.join(_FORMATS)}")
    if not len(agent.tools):
        raise DrawError(f"{key}: no tools are known of this class, so there is nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DrawError(
            "pictures need matplotlib: pip install matplotlib (or this package's extra 'plot')"
        ) from error
    figure = Figure(figsize=(13, 11), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.17, 1.07))
    axes.axis("off")
    axes.set_title(summary(key, agent), fontsize=11, pad=14)
    axes.text(0, -1.14, _LEGEND, ha="center", va="top", fontsize=8.5, color="#555555")
    names = _names(agent)
    shown = {START, END, *names}
    edges = [edge for edge in _edges(agent) if {edge.source, edge.target} <= shown]
    places = _places(names, edges)
    boxes = {name: _box(axes, name, agent, place) for name, place in places.items()}
    for edge in edges:
        if edge.source != edge.target:
            _arrow(axes, edge, places, boxes)
    figure.savefig(path, dpi=DPI)


def _names(agent: AgentClass) -> list[str]:
    tools = [(name, node.calls) for name, node in tools_by_calls(agent) if name != START]
    least = RARE * sum(calls for _, calls in tools)
    return [name for name, calls in tools if calls >= least][:MAX_TOOLS]


def _edges(agent: AgentClass) -> list[Edge]:
    """Arrows between different nodes, each once: with its greater probability, if it has two."""
    found: dict[tuple[str, str], Edge] = {}
    ends = [
        Edge(name, END, node.ends / node.passes)
        for name, node in agent.tools.items()
        if node.ends > LEAST * node.passes
    ]
    for edge in (*agent.tools.edges(LEAST), *ends):
        arrow = edge.source, edge.target
        if arrow not in found or found[arrow].probability < edge.probability:
            found[arrow] = edge
    return list(found.values())


def _places(names: Sequence[str], edges: Sequence[Edge]) -> dict[str, Place]:
    """The tool called most in the middle, the others around it, start left and end right.

    Who stands where on the ring is improved, two at a time, until the arrows get no shorter.
    """
    above, below = names[1::2], names[2::2]
    ring = [START, *above, END, *below]
    angles = [math.pi * (1 - index / (len(above) + 1)) for index in range(len(above) + 2)]
    angles += [-math.pi * (index + 1) / (len(below) + 1) for index in range(len(below))]
    spots = [(_RADII[0] * math.cos(a), _RADII[1] * math.sin(a)) for a in angles]
    middle = {names[0]: (0.0, 0.0)} if names else {}

    def length(order: Sequence[str]) -> float:
        at = {**dict(zip(order, spots, strict=True)), **middle}
        return sum(e.probability * math.dist(at[e.source], at[e.target]) for e in edges)

    least, better = length(ring), True
    while better:
        better = False
        for one, other in itertools.combinations(range(1, len(ring)), 2):
            if END in (ring[one], ring[other]):
                continue
            ring[one], ring[other] = ring[other], ring[one]
            now = length(ring)
            if now < least - 1e-9:
                least, better = now, True
            else:
                ring[one], ring[other] = ring[other], ring[one]
    return {**dict(zip(ring, spots, strict=True)), **middle}


def _box(axes: Axes, name: str, agent: AgentClass, place: Place) -> FancyBboxPatch:
    from matplotlib.patches import FancyBboxPatch

    node = agent.tools.get(name)
    colour = _JOIN if joined_tools(name) else _ENDS if name in (START, END) else _TOOL
    low_left = place[0] - _WIDTH / 2, place[1] - _HEIGHT / 2
    shape = "round,pad=0,rounding_size=0.02"
    box = FancyBboxPatch(
        low_left, _WIDTH, _HEIGHT, boxstyle=shape, fc=colour, ec="#555555", lw=0.8, zorder=4
    )
    axes.add_patch(box)
    title = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
    lines = [title]
    if node is not None and node.gaps.returns:
        gaps = node.gaps
        lines.append(f"{seconds(gaps.quantile_s(0.5))} / {seconds(gaps.quantile_s(0.95))}")
    again = node.next.get(name, 0.0) / max(node.passes, 1.0) if node is not None else 0.0
    if again >= LEAST:
        lines.append(f"again {again:.0%}")
    for row, text in enumerate(lines):
        y = place[1] + _LINE * ((len(lines) - 1) / 2 - row)
        size = 7.5 if row else 8.5 if len(text) <= _LONG_NAME else 6.0
        weight = "normal" if row else "bold"
        axes.text(
            place[0], y, text, ha="center", va="center", fontsize=size, weight=weight, zorder=5
        )
    return box


def _arrow(
    axes: Axes, edge: Edge, places: dict[str, Place], boxes: dict[str, FancyBboxPatch]
) -> None:
    from matplotlib.patches import FancyArrowPatch

    begin, end = places[edge.source], places[edge.target]
    colour = _PARALLEL if edge.parallel else _ARROW
    axes.add_patch(
        FancyArrowPatch(
            begin,
            end,
            connectionstyle=f"arc3,rad={_BEND}",
            arrowstyle="-|>",
            mutation_scale=8 + 8 * edge.probability,
            patchA=boxes[edge.source],
            patchB=boxes[edge.target],
            lw=0.5 + 5.5 * edge.probability,
            ls="--" if edge.parallel else "-",
            color=colour,
            alpha=0.35 + 0.5 * edge.probability,
            zorder=2,
        )
    )
    if edge.probability < LEAST_LABELLED or edge.parallel:
        return
    arc = (_on_arc(begin, end, t) for t in (0.4, 0.5, 0.6, 0.3))
    free = [spot for spot in arc if not any(_covers(place, spot) for place in places.values())]
    if free:
        x, y = free[0]
        axes.text(
            x, y, f"{edge.probability:.0%}", ha="center", va="center", fontsize=7, color=colour,
            zorder=3, bbox={"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.85},
        )  # fmt: skip


def _covers(place: Place, spot: Place) -> bool:
    """Whether a number at `spot` would touch the box at `place`."""
    aside, above = abs(place[0] - spot[0]), abs(place[1] - spot[1])
    return aside < _WIDTH / 2 + _LINE and above < _HEIGHT / 2 + _LINE / 2


def _on_arc(begin: Place, end: Place, t: float) -> Place:
    """The point a share `t` along matplotlib's "arc3" from `begin` to `end`."""
    dx, dy = end[0] - begin[0], end[1] - begin[1]
    bend = (begin[0] + end[0]) / 2 + _BEND * dy, (begin[1] + end[1]) / 2 - _BEND * dx
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
    x, y = (a * p + b * q + c * r for p, q, r in zip(begin, bend, end, strict=True))
    return x, y
