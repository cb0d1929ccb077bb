"""What the steps of this engine cost, learned from their timings; what more KV would be worth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_saga.policy.corner import Corner

# Believed until steps say otherwise: 10 ms a step and 10,000 prefill tokens a second.
_PRIOR = np.array([0.01, 1e-4, 0.0, 0.0])
# In these units the coefficients are of like size, so that one weight of the prior fits all.
_UNITS = np.array([1.0, 1e2, 1e6, 1e5])
_PRIOR_WEIGHT = 1e-3
_FORGET = 0.999
_SOLVE_EVERY = 16
# An error so many times the usual one is an outlier (a pause of the process), and counts less.
_OUTLIER = 4.0
_WINDOW_S = 30.0
_SHORTEST_S = 1e-6


class Step(NamedTuple):
    """What one engine step computed, in tokens.

    new: tokens scheduled. pairs: new tokens x the context each attends to. kv: context tokens read.
    calls: how many calls it was for.
    """

    new: int
    pairs: int
    kv: int
    calls: int = 1


class CostModel:
    """Seconds of a step = base + a x new + b x pairs + c x kv: least squares with forgetting.

    Errors count relative to the step's length, old steps fade over about 1,000, outliers count for
    little, no coefficient is negative.

    Attributes:
        spare: share of the time that lately passed in which the engine did nothing that grows with
            its work: it waited, or read weights that a larger batch would have read, too. So much
            engine time a full pool's worth of further workflows would gain.
        running: calls that a step was for, in the mean of the time that lately passed.
        known: whether enough steps were seen to speak of costs.
        corner: what this line leaves out: a step's first tokens cost nothing.
    """

    def __init__(self) -> None:
        self._theta = _PRIOR * _UNITS
        self._gram = np.zeros((4, 4))
        self._right = np.zeros(4)
        self._usual_error = 0.5
        self._per_token: tuple[float, ...] = tuple(map(float, _PRIOR))
        self.spare = 1.0
        self.running = 0.0
        self.corner = Corner()
        self._steps = 0

    def observe(self, step: Step, seconds: float, stands_for_s: float) -> None:
        """A step took `seconds`; steps like it filled `stands_for_s` seconds."""
        if seconds < _SHORTEST_S:
            return
        x = np.array((1.0, step.new, step.pairs, step.kv)) / (_UNITS * seconds)
        error = abs(1.0 - float(x @ self._theta))
        trust = min(1.0, _OUTLIER * self._usual_error / error) if error else 1.0
        self._usual_error += 0.02 * (min(error, _OUTLIER * self._usual_error) - self._usual_error)
        self._usual_error = max(self._usual_error, 0.01)
        self._gram = _FORGET * self._gram + trust * np.outer(x, x)
        self._right = _FORGET * self._right + trust * x
        self._steps += 1
        if self._steps % _SOLVE_EVERY == 0:
            self._solve()
        if self.known:
            _, _, pairs, kv = self._per_token
            attention_s = min(pairs * step.pairs + kv * step.kv, seconds)
            self.corner.observe(step.new, step.calls, seconds - attention_s)
        work = min(self.work_s(step), seconds)
        self._pass(stands_for_s, 1.0 - work / seconds, step.calls)

    @property
    def known(self) -> bool:
        return self._steps >= 4 * _SOLVE_EVERY

    def observe_idle(self, seconds: float) -> None:
        """The engine computed nothing for so long, though calls were there."""
        if seconds > 0.0:
            self._pass(seconds, 1.0, 0)

    def work_s(self, step: Step) -> float:
        """The part of a step's seconds that grows with what it computes."""
        _, new, pairs, kv = self._per_token
        return new * step.new + pairs * step.pairs + kv * step.kv

    def prefill_s(self, tokens: int) -> float:
        """Engine seconds to compute a context of `tokens` tokens from nothing."""
        return self.work_s(Step(tokens, tokens * tokens // 2, 0))

    def _solve(self) -> None:
        """The coefficients that fit best; one that would be negative is 0."""
        scale = _PRIOR_WEIGHT * max(float(np.trace(self._gram)), 1e-12)
        gram = self._gram + scale * np.eye(4)
        right = self._right + scale * _PRIOR * _UNITS
        kept = list(range(4))
        while kept:
            theta = np.linalg.solve(gram[np.ix_(kept, kept)], right[kept])
            if (theta >= 0.0).all():
                break
            del kept[int(theta.argmin())]
        self._theta = np.zeros(4)
        self._theta[kept] = theta
        self._per_token = tuple(map(float, self._theta / _UNITS))

    def _pass(self, seconds: float, spare: float, running: int) -> None:
        share = seconds / (seconds + _WINDOW_S)
        self.spare += share * (spare - self.spare)
        self.running += share * (running - self.running)
