"""The tools an agent class calls, and what follows each: nodes and edges of its execution graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vllm_saga.policy.gaps import GapModel
from vllm_saga.policy.means import RunningMean
from vllm_saga.policy.records import MAX_JOINED, MAX_NAME, MAX_TOOLS, NodeRecord

#: Where every context starts: the node before its first call.
START = "(start)"
#: A call whose output called no tool: an answer, which a person or the end follows.
ANSWER = "(answer)"
#: Sub-agents have run, and the context that waited for them goes on.
SUBAGENTS = "(subagents)"
JOINT = "+"
# What our own names are made of: no tool may be called "(start)".
_RESERVED = str.maketrans({JOINT: "_", "(": None, ")": None})

_FORGET_AT = 500.0
_FORGET_ALL_AT = 2000.0
_BACK_OFF_WEIGHT = 4.0


def node_name(tools: Sequence[str]) -> str:
    """The node of a call whose output called `tools`: sorted, each once, joined by "+".

    Names come from a model's output: control characters go, the rest is cut to 64 characters, and
    more than four tools are the first four.
    """
    names = sorted({clean for tool in tools if (clean := _clean(tool))})
    return JOINT.join(names[:MAX_JOINED]) or ANSWER


def joined_tools(node: str) -> tuple[str, ...]:
    """The tools that a join node waits for; none for a node of one tool."""
    tools = tuple(node.split(JOINT))
    return tools if len(tools) > 1 else ()


def _clean(tool: str) -> str:
    text = "".join(sign for sign in tool[: 4 * MAX_NAME] if sign.isprintable())
    return text.translate(_RESERVED).strip()[:MAX_NAME].strip()


class Edge(NamedTuple):
    """One arrow of the graph.

    probability: share of what follows `source`. An arrow that fans out to a tool called in
    parallel, or leads from there to the join, has the probability of the whole join.
    """

    source: str
    target: str
    probability: float
    parallel: bool = False


class ToolNode:
    """A tool, or several called in parallel: what is known of the calls that follow it."""

    def __init__(self, gaps: GapModel, growth: RunningMean) -> None:
        self.gaps = GapModel(gaps)
        self.growth = RunningMean(growth)
        self.calls = 0.0
        self.ends = 0.0
        self.next: dict[str, float] = {}
        self._followed = 0.0

    @property
    def passes(self) -> float:
        """How often it was left: for another node, or because the workflow ended."""
        return self._followed + self.ends

    def observe_next(self, tool: str) -> None:
        self.next[tool] = self.next.get(tool, 0.0) + 1.0
        self._followed += 1.0
        self._forget()

    def observe_end(self) -> None:
        self.ends += 1.0
        self._forget()

    def drop(self, tool: str) -> None:
        """`tool` is no node any more."""
        self._followed = max(self._followed - self.next.pop(tool, 0.0), 0.0)

    def _forget(self) -> None:
        if self.passes > _FORGET_AT:
            self.next = {tool: count * 0.5 for tool, count in self.next.items()}
            self._followed *= 0.5
            self.ends *= 0.5

    def record(self, tool: str) -> NodeRecord:
        """All there is to know, for `restore`."""
        growth, gaps = self.growth.record(), self.gaps.record()
        return NodeRecord(tool, self.calls, self.ends, dict(self.next), growth, gaps)

    def restore(self, record: NodeRecord) -> None:
        self.calls, self.ends, self.next = record.calls, record.ends, dict(record.next)
        self._followed = sum(record.next.values())
        self.growth.restore(record.growth_tokens)
        self.gaps.restore(record.gaps_s)


class ToolGraph:
    """Transitions between at most `limit` nodes; the one used least lately goes first.

    What follows a tool is its own counts, completed by the frequencies of all tools at the weight
    of four transitions. A node's counts are halved every 500, the frequencies every 2,000.

    Args:
        gaps, growth: the class's, which complete those of a node with little evidence.
    """

    def __init__(self, gaps: GapModel, growth: RunningMean, limit: int = MAX_TOOLS) -> None:
        self._gaps = gaps
        self._growth = growth
        self._limit = limit
        self._nodes: OrderedDict[str, ToolNode] = OrderedDict()
        self._calls = 0.0
        self._ends = 0.0

    @property
    def ends(self) -> float:
        """Workflows that ended after a call whose tools were known."""
        return self._ends

    def __len__(self) -> int:
        return len(self._nodes)

    def items(self) -> Iterator[tuple[str, ToolNode]]:
        """Names and nodes, used last come last."""
        yield from self._nodes.items()

    def get(self, tool: str | None) -> ToolNode | None:
        return None if tool is None else self._nodes.get(tool)

    def observe(self, previous: str | None, tool: str) -> None:
        """A call that came after `previous` (None: not known) led to `tool`."""
        node = self._visit(tool)
        node.calls += 1.0
        self._calls += 1.0
        before = self._visit(START) if previous == START else self.get(previous)
        if before is not None:
            before.observe_next(tool)
        self._forget()

    def observe_end(self, tool: str | None) -> None:
        """The workflow ended, or is presumed to have, after `tool` (None: not known)."""
        if tool is None:
            return
        self._ends += 1.0
        node = self.get(tool)
        if node is not None:
            node.observe_end()
        self._forget()

    def retract_end(self, tool: str | None) -> None:
        """A workflow presumed to have ended after `tool` came back after all."""
        if tool is None:
            return
        self._ends = max(self._ends - 1.0, 0.0)
        node = self.get(tool)
        if node is not None:
            node.ends = max(node.ends - 1.0, 0.0)

    def next_tools(self, tool: str | None) -> dict[str, float]:
        """Probability of each node to follow `tool` (None: not known); the rest is the end."""
        total = self._calls + self._ends
        if not total:
            return {}
        out = {name: node.calls / total for name, node in self._nodes.items() if node.calls}
        node = self.get(tool)
        if node is None:
            return out
        weight = node.passes + _BACK_OFF_WEIGHT
        return {
            name: (node.next.get(name, 0.0) + _BACK_OFF_WEIGHT * share) / weight
            for name, share in out.items()
        }

    def p_end(self, tool: str | None) -> float:
        """Probability that the workflow ends after `tool` (None: not known)."""
        share = self._ends / max(self._calls + self._ends, 1.0)
        node = self.get(tool)
        if node is None:
            return share
        return (node.ends + _BACK_OFF_WEIGHT * share) / (node.passes + _BACK_OFF_WEIGHT)

    def edges(self, least: float = 0.0) -> list[Edge]:
        """What was seen to follow what, with a probability of at least `least`.

        Tools called in parallel fan out from the node before and join in their join node.
        """
        arrows: list[Edge] = []
        joins: dict[str, float] = {}
        for name, node in self._nodes.items():
            for target, count in node.next.items():
                probability = count / node.passes
                if probability < least:
                    continue
                branches = joined_tools(target)
                if not branches:
                    arrows.append(Edge(name, target, probability))
                    continue
                joins[target] = max(probability, joins.get(target, 0.0))
                arrows += [Edge(name, branch, probability, True) for branch in branches]
        for join, probability in joins.items():
            arrows += [Edge(tool, join, probability, True) for tool in joined_tools(join)]
        return arrows

    def record(self) -> tuple[NodeRecord, ...]:
        """All there is to know, for `restore`."""
        return tuple(node.record(name) for name, node in self._nodes.items())

    def restore(self, records: Iterable[NodeRecord], ends: float) -> None:
        """ends: `ends` of the class, which has forgotten at another pace than its nodes."""
        for record in records:
            self._visit(record.tool).restore(record)
        self._calls = sum(node.calls for node in self._nodes.values())
        self._ends = ends

    def _visit(self, name: str) -> ToolNode:
        node = self._nodes.get(name)
        if node is not None:
            self._nodes.move_to_end(name)
            return node
        if len(self._nodes) >= self._limit:
            gone, evicted = self._nodes.popitem(last=False)
            self._calls -= evicted.calls
            for other in self._nodes.values():
                other.drop(gone)
        # A workflow whose sub-agents run is not away: its class learns nothing from how long it is.
        gaps = GapModel() if name == SUBAGENTS else self._gaps
        node = self._nodes[name] = ToolNode(gaps, self._growth)
        return node

    def _forget(self) -> None:
        if self._calls + self._ends > _FORGET_ALL_AT:
            for node in self._nodes.values():
                node.calls *= 0.5
            self._calls *= 0.5
            self._ends *= 0.5
