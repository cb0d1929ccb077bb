"""What was decided about a workflow, and why: kept with it for those who ask."""

from __future__ import annotations

from typing import NamedTuple

#: So many are kept of each workflow, the last ones.
MAX_DECISIONS = 8

HELD = "held"
ENTERED = "entered"
FORCED = "forced"
DISPLACED = "displaced"
GAVE_WAY = "gave way"
PRESUMED_ENDED = "presumed ended"
LEFT = "left"

NO_ROOM = "it did not fit the KV pool"
IN_LINE = "others were waiting already"
FITTED = "there was room"
OVERDUE = "its deadline had come, and there was no room"
OUTGROWN = "residents had outgrown the KV pool, and it was the youngest of those in a gap"
WORTH_LESS = "others wait, and keeping its KV through its gap costs more than computing it again"
IDLE_ENGINE = "calls were held, and none could run"
AWAY = "it is away for longer than nearly all of its kind that return"
EMPTIED = "the prefix cache was emptied"


class Decision(NamedTuple):
    """At what time (the policy's clock), what and why; blocks: by how many it did not fit then."""

    at: float
    what: str
    why: str
    blocks: int = 0
