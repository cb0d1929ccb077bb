"""How long a workflow stays away between two calls, and whether it comes back at all."""

from __future__ import annotations

import math

from vllm_saga.policy.calibration import Calibration
from vllm_saga.policy.records import NUM_GAP_BINS as _NUM_BINS
from vllm_saga.policy.records import GapRecord

_FIRST_EDGE_S = 0.01
_BINS_PER_DECADE = 8
_FORGET_AT = 2000.0
_BIN_MIDDLE = 10.0 ** (-0.5 / _BINS_PER_DECADE)

DOUBT = 0.5
"""So little likely to return, a workflow counts as one that has ended, until it returns."""

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


def _upper_edge(index: float) -> float:
    return _FIRST_EDGE_S * math.exp(math.log(10.0) * index / _BINS_PER_DECADE)


def judged_again_at(since: float, now: float, doubt_s: float, patience_s: float) -> float:
    """When an absence is judged anew: its return in doubt after `doubt_s`, its end presumed after
    `patience_s`; between the two whenever it has doubled, as what is learned meanwhile counts.
    """
    if now < since + doubt_s:
        return since + doubt_s
    return min(now + (now - since), since + patience_s)


class GapModel:
    """Empirical gap distribution of an agent class or a tool, with those who never came back.

    A log-binned histogram (8 bins per decade, 10 ms to 1000 s), halved every 2,000 observations so
    that it follows a change of workload. Gaps are not log-normal: the tail is kept as it was seen.
    Little evidence of its own is completed by `parent` (a tool's by its class's, a class's by all
    classes'), which learns what all its children see; the root starts from published figures. Both
    weigh as much as four observations.
    """

    def __init__(self, parent: GapModel | None = None) -> None:
        self._parent = parent
        self._counts = [0.0] * _NUM_BINS
        self._returns = 0.0
        self._ends = 0.0
        self._calibration = Calibration()
        if parent is None:
            for gap_s, share in _PRIOR_GAPS:
                self._counts[_bin(gap_s)] += share * _BACK_OFF_WEIGHT
                self._returns += share * _BACK_OFF_WEIGHT

    def observe_return(self, gap_s: float) -> None:
        """A workflow came back `gap_s` seconds after its last call had ended."""
        self._observe_bin(_bin(max(gap_s, 0.0)))

    def _observe_bin(self, index: int) -> None:
        if self._parent is not None:
            self._calibration.observe(*self._places(index))
            self._parent._observe_bin(index)
        self._counts[index] += 1.0
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

    def return_rate(self, idle_s: float) -> float:
        """P(return) over the expected seconds to the return, of a workflow idle for `idle_s`."""
        counts, ends = self._blended()
        later = waits_s = 0.0
        for index in range(_bin(idle_s) + 1, _NUM_BINS):
            later += counts[index]
            waits_s += counts[index] * max(_upper_edge(index) * _BIN_MIDDLE - idle_s, 0.0)
        if not later or not waits_s:
            return 0.0
        return later / (later + ends) * later / waits_s

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

        break_even_s: seconds of holding that cost as much as computing it again; inf where nobody
        knows, and nothing is given up. Holding costs the time until the return, or until the KV is
        given up; giving it up costs `break_even_s` if the workflow returns. The time with the least
        expected cost (ski rental with a known distribution of the season: Karlin et al.,
        Algorithmica 11, 1994).
        """
        if math.isinf(break_even_s):
            return math.inf
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

    def quantile_s(self, share: float) -> float:
        """Seconds within which `share` of the gaps end, of those that end."""
        counts, _ = self._blended()
        left = share * sum(counts)
        for index, count in enumerate(counts):
            if count and left <= count:
                if index == 0:
                    return _FIRST_EDGE_S * left / count
                return _upper_edge(index - 1 + left / count)
            left -= count
        return _upper_edge(_NUM_BINS - 1)

    def probability(self, gap_s: float) -> float:
        """Predicted share of the gaps that end which fall in the bin (33 % wide) of `gap_s`."""
        below, up_to = self._places(_bin(max(gap_s, 0.0)))
        return up_to - below

    def calibration(self) -> float:
        """How far the gaps fell where they had been predicted: 1 = as often as said, 0 = never.

        Each gap counts by the prediction made before it was seen (`Calibration`). The root, which
        predicts for nobody, does not keep it.
        """
        return self._calibration.score

    @property
    def returns(self) -> float:
        """Gaps seen here that ended, less those forgotten."""
        return self._returns

    @property
    def evidence(self) -> float:
        """The share that what was seen here has in what is predicted; the parent's is the rest."""
        seen = self._returns + self._ends
        return seen / (seen + _BACK_OFF_WEIGHT)

    def record(self) -> GapRecord:
        """All there is to know but for the parent, for `restore`."""
        return GapRecord(tuple(self._counts), self._ends, self._calibration.record())

    def restore(self, record: GapRecord) -> None:
        self._counts = list(record.returns)
        self._returns = sum(record.returns)
        self._ends = record.ends
        self._calibration.restore(record.pit)

    def _places(self, index: int) -> tuple[float, float]:
        """Predicted share of the gaps below a bin, and up to its upper edge."""
        below, here, total = self._mass(index)
        return below / total, (below + here) / total

    def _mass(self, index: int) -> tuple[float, float, float]:
        """What `_blended` counts below a bin, in it, and in all."""
        below, here = sum(self._counts[:index]), self._counts[index]
        total = sum(self._counts)
        if self._parent is not None:
            others, scale = self._parent._mass(index), self._scale()
            below, here = below + scale * others[0], here + scale * others[1]
            total += scale * others[2]
        return below, here, total

    def _blended(self) -> tuple[list[float], float]:
        """Gap counts and ends, completed by the parent's."""
        parent = self._parent
        if parent is None:
            return self._counts, max(self._ends, _LEAST_ENDS)
        others, other_ends, least_ends = parent._counts, parent._ends, _LEAST_ENDS
        if parent._parent is not None:
            # A tool completed by its class, which is completed in turn and has its least ends.
            others, other_ends = parent._blended()
            least_ends = 0.0
        scale = self._scale()
        pairs = zip(self._counts, others, strict=True)
        ends = self._ends + other_ends * scale
        return [own + scale * other for own, other in pairs], max(ends, least_ends)

    def _scale(self) -> float:
        """What an observation of the parent's counts here."""
        parent = self._parent
        if parent is None:
            return 0.0
        weight = parent._returns + parent._ends
        return _BACK_OFF_WEIGHT / (weight if parent._parent is None else weight + _BACK_OFF_WEIGHT)
