"""How long a workflow stays away between two calls, and whether it comes back at all."""

from __future__ import annotations

import math

_FIRST_EDGE_S = 0.01
_BINS_PER_DECADE = 8
_NUM_BINS = 5 * _BINS_PER_DECADE + 1
_FORGET_AT = 2000.0
_BIN_MIDDLE = 10.0 ** (-0.5 / _BINS_PER_DECADE)

# Coding-agent tool latencies (TraceLab, arXiv 2606.30560): the share of gaps up to each duration.
_PRIOR_GAPS = ((0.3, 0.61), (4.0, 0.27), (25.0, 0.08), (150.0, 0.04))
_BACK_OFF_WEIGHT = 4.0
# A workflow ends once: without this, a class in which none has ended yet would never give up.
_LEAST_ENDS = 1.0


def _bin(seconds: float) -> int:
    if seconds <= _FIRST_EDGE_S:
        return 0
    index = 1 + int(math.log10(seconds / _FIRST_EDGE_S) * _BINS_PER_DECADE)
    return min(index, _NUM_BINS - 1)


def _upper_edge(index: int) -> float:
    return _FIRST_EDGE_S * math.exp(math.log(10.0) * index / _BINS_PER_DECADE)


class GapModel:
    """Empirical gap distribution of one agent class, with the workflows that never came back.

    A log-binned histogram (8 bins per decade, 10 ms to 1000 s), halved every 2,000 observations so
    that it follows a change of workload. Gaps are not log-normal: the tail is kept as it was seen.
    Little evidence of its own is completed by `parent`, which learns what all its children see;
    the root starts from published figures. Both weigh as much as four observations.
    """

    def __init__(self, parent: GapModel | None = None) -> None:
        self._parent = parent
        self._counts = [0.0] * _NUM_BINS
        self._returns = 0.0
        self._ends = 0.0
        if parent is None:
            for gap_s, share in _PRIOR_GAPS:
                self._counts[_bin(gap_s)] += share * _BACK_OFF_WEIGHT
                self._returns += share * _BACK_OFF_WEIGHT

    def observe_return(self, gap_s: float) -> None:
        """A workflow came back `gap_s` seconds after its last call had ended."""
        if self._parent is not None:
            self._parent.observe_return(gap_s)
        self._counts[_bin(max(gap_s, 0.0))] += 1.0
        self._returns += 1.0
        if self._returns + self._ends > _FORGET_AT:
            self._counts = [count * 0.5 for count in self._counts]
            self._returns *= 0.5
            self._ends *= 0.5

    def observe_end(self) -> None:
        """A workflow ended, or has been away so long that it is presumed to have."""
        if self._parent is not None:
            self._parent.observe_end()
        self._ends += 1.0

    def retract_end(self) -> None:
        """A workflow presumed to have ended came back after all."""
        if self._parent is not None:
            self._parent.retract_end()
        self._ends = max(self._ends - 1.0, 0.0)

    def p_return(self, idle_s: float) -> float:
        """Probability that a workflow idle for `idle_s` seconds makes another call."""
        counts, ends = self._blended()
        still_away = sum(counts[_bin(idle_s) + 1 :])
        return still_away / (still_away + ends)

    def patience_s(self, threshold: float) -> float:
        """Idle seconds after which `p_return` falls below `threshold`."""
        counts, ends = self._blended()
        still_away = sum(counts)
        for index, count in enumerate(counts):
            still_away -= count
            if still_away < threshold * (still_away + ends):
                return _upper_edge(index)
        return _upper_edge(_NUM_BINS - 1)

    def give_way_s(self, break_even_s: float) -> float:
        """Idle seconds after which giving up the KV is expected to be cheaper than holding it.

        break_even_s: seconds of holding that cost as much as computing it again. Holding costs the
        time until the return, or until the KV is given up; giving it up costs `break_even_s` if the
        workflow returns. The time with the least expected cost (ski rental with a known
        distribution of the season: Karlin et al., Algorithmica 11, 1994).
        """
        counts, ends = self._blended()
        later = sum(counts)
        best_s, least = 0.0, later * break_even_s
        returned_s = 0.0
        for index, count in enumerate(counts):
            edge = _upper_edge(index)
            later -= count
            returned_s += count * (edge if index == 0 else edge * _BIN_MIDDLE)
            cost = returned_s + later * (edge + break_even_s) + ends * edge
            if cost < least:
                best_s, least = edge, cost
        return best_s

    def _blended(self) -> tuple[list[float], float]:
        """Gap counts and ends, completed by the parent's."""
        parent = self._parent
        if parent is None:
            return self._counts, max(self._ends, _LEAST_ENDS)
        scale = _BACK_OFF_WEIGHT / (parent._returns + parent._ends)
        pairs = zip(self._counts, parent._counts, strict=True)
        ends = self._ends + parent._ends * scale
        return [own + scale * other for own, other in pairs], max(ends, _LEAST_ENDS)
