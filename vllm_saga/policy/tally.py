"""What has happened, counted for operators: sums since the start, and values nobody has read yet.

Series and labels are those of the engine's metrics (engine/stats.py says what they mean).
"""

from __future__ import annotations

HOLDS = "holds"
HOLD_S = "hold_seconds"
FORCED = "holds_forced"
ABORTED = "holds_aborted"
LOST_PLACE = "residency_lost"
RESUMED_TOKENS = "resumed_tokens"
GAP_S = "gap_seconds"
GAP_ERROR_S = "gap_error_seconds"
TASK_S = "task_seconds"
ENDED = "sessions_ended"

NO_ROOM, IN_LINE = "no_room", "in_line"
NEW, BEGUN = "new", "begun"
GAVE_WAY, IDLE_ENGINE, DISPLACED = "gave_way", "idle_engine", "displaced"
HIT, LOST = "hit", "lost"
SOONER, LATER = "sooner", "later"

#: So many values of one series and label are kept until they are taken; more are left out.
MOST_VALUES = 4096

Key = tuple[str, str]
"""(series, label): a label is one of a small fixed set, or empty."""


class Tally:
    """Counts what a policy does. O(1) each."""

    def __init__(self) -> None:
        self.sums: dict[Key, float] = {}
        self._values: dict[Key, list[float]] = {}

    def add(self, series: str, label: str = "", amount: float = 1.0) -> None:
        """It has happened `amount` times more."""
        key = (series, label)
        self.sums[key] = self.sums.get(key, 0.0) + amount

    def count(self, series: str, *labels: str) -> int:
        """How often it has happened, with any of these labels (none: of a series without)."""
        return int(sum(self.sums.get((series, label), 0.0) for label in labels or ("",)))

    def see(self, series: str, value: float, label: str = "") -> None:
        """One more value of a distribution."""
        values = self._values.setdefault((series, label), [])
        if len(values) < MOST_VALUES:
            values.append(value)

    def take(self) -> dict[Key, list[float]]:
        """The values seen since this was last asked."""
        taken, self._values = self._values, {}
        return taken
