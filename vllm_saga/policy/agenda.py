"""What falls due when, where most of it is called off before."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

# It is tidied when so many more entries are in it than can still stand.
_EXCESS = 4
_FEW = 64


class Agenda(Generic[Item]):
    """Items by the time they are due; of those due together, the first added comes first.

    Nothing is ever removed: what does not stand any more is passed over when its time comes, or
    dropped when there is too much of it. O(log n) each, amortised.

    Args:
        stands: whether an item still stands; once False, False for good.
    """

    def __init__(self, stands: Callable[[Item], bool]) -> None:
        self._stands = stands
        self._heap: list[tuple[float, int, Item]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, item: Item, standing: int) -> None:
        """`item` is due at `when`; no more than `standing` items stand now."""
        heapq.heappush(self._heap, (when, next(self._order), item))
        if len(self._heap) > _EXCESS * standing + _FEW:
            self._heap = [entry for entry in self._heap if self._stands(entry[2])]
            heapq.heapify(self._heap)

    def due(self, now: float) -> tuple[float, Item] | None:
        """The first item due by `now` that stands, and when it was due; it stays."""
        heap = self._heap
        while heap and not self._stands(heap[0][2]):
            heapq.heappop(heap)
        return (heap[0][0], heap[0][2]) if heap and heap[0][0] <= now else None

    def take(self, now: float) -> tuple[float, Item] | None:
        """As `due`, and it is taken out."""
        found = self.due(now)
        if found is not None:
            heapq.heappop(self._heap)
        return found
