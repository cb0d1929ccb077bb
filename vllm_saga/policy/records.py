"""What is kept of the agent classes between runs: the shape of the document, and its limits."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_saga.policy import calibration

NUM_GAP_BINS = 41
NUM_LENGTH_BINS = 36
MAX_TOOLS = 64
MAX_NAME = 64
#: Tools that one name of a node joins at most.
MAX_JOINED = 4
_MAX_NODE_NAME = MAX_JOINED * (MAX_NAME + 1)

Weight = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Sum = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
NodeName = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_NODE_NAME)]
Pit = Annotated[
    tuple[Weight, ...],
    msgspec.Meta(min_length=calibration.NUM_BINS, max_length=calibration.NUM_BINS),
]
GapCounts = Annotated[
    tuple[Weight, ...], msgspec.Meta(min_length=NUM_GAP_BINS, max_length=NUM_GAP_BINS)
]
LengthCounts = Annotated[
    tuple[Weight, ...], msgspec.Meta(min_length=NUM_LENGTH_BINS, max_length=NUM_LENGTH_BINS)
]


class MeanRecord(msgspec.Struct, frozen=True):
    """Sum, sum of squares and number of the values seen (`means.RunningMean`)."""

    sum: Sum
    squares: Sum
    weight: Weight


class LengthRecord(msgspec.Struct, frozen=True):
    """Workflows that reached each bin of calls, and that ended in it (`lengths.LengthModel`)."""

    reached: LengthCounts
    ended: LengthCounts


class GapRecord(msgspec.Struct, frozen=True):
    """Returns by bin of their gap, ends, and how predictions came true (`gaps.GapModel`)."""

    returns: GapCounts
    ends: Weight
    pit: Pit


class NodeRecord(msgspec.Struct, frozen=True):
    """A tool: how often it was called, what followed, how long it took, what it added."""

    tool: NodeName
    calls: Weight
    ends: Weight
    next: Annotated[dict[NodeName, Weight], msgspec.Meta(max_length=MAX_TOOLS)]
    growth_tokens: MeanRecord
    gaps_s: GapRecord


class AgentRecord(msgspec.Struct, frozen=True):
    """An agent class (`graph.AgentClass`): its statistics, and its tools, last used last."""

    gaps_s: GapRecord
    calls: LengthRecord
    growth_tokens: MeanRecord
    cycle_s: MeanRecord
    anonymous: tuple[Weight, Weight]
    ends: Weight = 0.0
    tools: Annotated[tuple[NodeRecord, ...], msgspec.Meta(max_length=MAX_TOOLS)] = ()
