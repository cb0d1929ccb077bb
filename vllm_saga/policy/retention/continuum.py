"""A time to live for each context that pays for itself (Continuum, arXiv 2511.02230)."""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections import deque
from statistics import fmean

import numpy as np

from vllm_saga.policy.price import Price
from vllm_saga.policy.retention.base import Retention
from vllm_saga.policy.workflow import Context, Workflow

#: Observed gaps before a distribution is trusted: of any tool, and of one tool (K in the paper).
ENOUGH = 100
#: Gaps remembered of any tool and of one; beyond, every second one is dropped. And tools.
MOST_GAPS, MOST_TOOLS = 8192, 256
#: Waits of evicted calls that the mean is taken over. Not published; ours.
WAITS = 256


class TimeToLive:
    """How long to keep a context: the τ that maximises P(gap ≤ τ) × B - τ.

    B = mean wait of evicted calls × η + seconds to compute the context again. The candidates for τ
    are 0 and the gaps seen: those after the same tool once there are more than `ENOUGH`, else those
    after any tool; before that, gaps are taken to be Exp(1 s), which gives τ = ln B. η is minus the
    correlation of calls made and calls left over the programs that have ended; 1 at first.
    """

    def __init__(self) -> None:
        self._gaps = array("d")
        self._gaps_of: dict[str, array[float]] = {}
        self._waits: deque[float] = deque(maxlen=WAITS)
        self._pairs = self._sum = self._squares = self._products = 0

    def saw_gap(self, tool: str, seconds: float) -> None:
        """A call came `seconds` after the one before it, which had invoked `tool`."""
        if tool not in self._gaps_of and len(self._gaps_of) >= MOST_TOOLS:
            tool = ""
        for gaps in (self._gaps, self._gaps_of.setdefault(tool, array("d"))):
            insort(gaps, seconds)
            if len(gaps) > MOST_GAPS:
                del gaps[::2]

    def saw_wait(self, seconds: float) -> None:
        """A call whose context was not pinned waited so long to be scheduled."""
        self._waits.append(seconds)

    def saw_end(self, calls: int) -> None:
        """A program has ended after so many calls: pairs (k, calls - k) for k = 1 … calls - 1."""
        n = calls
        self._pairs += n - 1
        self._sum += n * (n - 1) // 2
        squares = (n - 1) * n * (2 * n - 1) // 6
        self._squares += squares
        self._products += n * (n * (n - 1) // 2) - squares

    @property
    def eta(self) -> float:
        # Calls made and calls left have the same sum and the same squares.
        spread = self._pairs * self._squares - self._sum**2
        if spread <= 0:
            return 1.0
        return -(self._pairs * self._products - self._sum**2) / spread

    def seconds(self, tool: str, reload_s: float) -> float:
        """τ after a call that invoked `tool`, for a context that takes `reload_s` to compute."""
        wait = fmean(self._waits) if self._waits else 0.0
        if len(self._gaps) <= ENOUGH:
            benefit = wait + reload_s
            return math.log(benefit) if benefit > 1.0 else 0.0
        benefit = wait * self.eta + reload_s
        gaps = self._gaps_of.get(tool, self._gaps)
        if len(gaps) <= ENOUGH:
            gaps = self._gaps
        taus = np.frombuffer(gaps)
        shares = np.arange(1, len(taus) + 1) / len(taus)
        gains = shares * benefit - taus
        best = int(gains.argmax())
        at_once = float(np.searchsorted(taus, 0.0, side="right")) / len(taus) * benefit
        return float(taus[best]) if gains[best] > at_once else 0.0


class TimeToLivePins(Retention):
    """A context is protected for its time to live τ after its call; LRU among the others."""

    def __init__(self, price: Price) -> None:
        self._price = price
        self._time_to_live = TimeToLive()

    def worth(self, context: Context, now: float) -> float:
        return context.idle_since

    def on_rest(self, context: Context, now: float) -> None:
        reload_s = self._price.prefill_s(max(context.tokens, 1))
        tool = context.session.workflow.tool or ""
        context.protected_until = now + self._time_to_live.seconds(tool, reload_s)

    def on_return(self, workflow: Workflow, gap_s: float) -> None:
        self._time_to_live.saw_gap(workflow.tool or "", gap_s)

    def on_release(self, workflow: Workflow, held_s: float) -> None:
        self._time_to_live.saw_wait(held_s)

    def on_end(self, workflow: Workflow) -> None:
        self._time_to_live.saw_end(workflow.calls_done)
