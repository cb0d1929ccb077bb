"""Seconds of an engine step, fitted to the steps it has made: the roofline's corner included."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Believed until steps say otherwise: 10 ms a step and 10,000 prefill tokens a second.
_PRIOR = np.array([0.01, 1e-4, 0.0, 0.0])
# In these units the coefficients are of like size, so that one weight of the prior fits all.
_UNITS = np.array([1.0, 1e2, 1e6, 1e5])
_PRIOR_WEIGHT = 1e-5
# Of each size of step about the last so many are remembered; all fade over 10,000 or so.
_MEMORY = 64
_FADE = 0.9984
_SIZES = 16
# Corners tried: none, and 16 to 1,024 tokens, each a fifth larger than the one before.
_CORNERS = np.array([0.0, *(16.0 * 2.0 ** (n / 4) for n in range(25))])
# A corner is believed if it explains the steps so much better (difference of log likelihoods), if
# it leaves more than half of a decode step to the weights, and if steps next to it are as it says.
_BETTER = 5.0
_MOST_OVERHEAD = 0.5
_MOST_SURPRISE = 1.4

_Floats = npt.NDArray[np.floating]


class Step(NamedTuple):
    """What one engine step computed, in tokens.

    new: tokens scheduled. pairs: new tokens x the context each attends to. kv: context tokens read.
    calls: how many calls it was for.
    """

    new: int
    pairs: int
    kv: int
    calls: int = 1


class StepFit:
    """Seconds of a step = overhead + a x max(new, corner) + b x pairs + c x kv, by least squares.

    Up to `corner` new tokens a step takes what a step of one token does, because reading the
    weights hides the arithmetic (roofline: Williams et al., CACM 2009). So a decode step has room
    for so many tokens of prefill (chunked prefill, Sarathi-Serve: Agrawal et al., OSDI 2024), and
    every further one stretches the steps of all who decode.

    Of several corners the one that explains the steps best is taken. Errors count relative to the
    step's length; no coefficient is negative; each size of step (a power of two) has a memory of
    its own, so that many short ones do not make the few long ones forgotten.

    Attributes:
        overhead_s: seconds of a step before it has computed or read anything.
        token_s, pair_s, kv_s: a, b, c above, in seconds.
        corner: in tokens; 0 if every token costs, or nobody knows.
        free_tokens: new tokens of a step that take no longer than one; 0 where they are few (a step
            is mostly overhead, or every token costs), or steps as large as the corner take longer.
    """

    def __init__(self) -> None:
        self.overhead_s, self.token_s, self.pair_s, self.kv_s = map(float, _PRIOR)
        self.corner = 0.0
        self.free_tokens = 0
        many = len(_CORNERS)
        self._gram = np.zeros((_SIZES, many, 4, 4))
        self._right = np.zeros((_SIZES, many, 4))
        self._weight = np.zeros(_SIZES)

    @property
    def decode_s(self) -> float:
        """Seconds of a step that computes few tokens, attention aside."""
        return self.overhead_s + self.token_s * self.corner

    def seconds(self, step: Step) -> float:
        """What such a step takes."""
        return self.decode_s + self.growing_s(step)

    def growing_s(self, step: Step) -> float:
        """The part of a step's seconds that grows with what it computes."""
        beyond = max(step.new - self.corner, 0.0)
        return self.token_s * beyond + self.pair_s * step.pairs + self.kv_s * step.kv

    def observe(self, step: Step, seconds: float, trust: float = 1.0) -> None:
        """A step took `seconds`; `trust` within (0, 1]. Counts from the next `solve` on."""
        size = min(step.new.bit_length(), _SIZES) - 1
        rows = np.empty((len(_CORNERS), 4))
        rows[:] = (1.0, 0.0, step.pairs, step.kv)
        rows[:, 1] = np.maximum(_CORNERS, step.new)
        rows /= _UNITS * seconds
        keep = 1.0 - 1.0 / _MEMORY
        self._gram[size] = keep * self._gram[size] + trust * rows[:, :, None] * rows[:, None, :]
        self._right[size] = keep * self._right[size] + trust * rows
        self._weight[size] = keep * self._weight[size] + trust

    def solve(self) -> None:
        """Fit anew; called every 16 steps or so."""
        gram, right, weight = self._gram.sum(0), self._right.sum(0), float(self._weight.sum())
        if not weight:
            return
        for sums in (self._gram, self._right, self._weight):
            sums *= _FADE
        fits = np.array([_fit(g, r) for g, r in zip(gram, right, strict=True)])
        error = weight - 2.0 * (fits * right).sum(1) + np.einsum("ki,kij,kj->k", fits, gram, fits)
        error = np.maximum(error, 1e-6 * weight)
        best = int(error.argmin())
        if weight / 2.0 * math.log(error[0] / error[best]) < _BETTER:
            best = 0
        self.corner = float(_CORNERS[best])
        self.overhead_s, self.token_s, self.pair_s, self.kv_s = map(float, fits[best] / _UNITS)
        # Steps as large as the corner: what the fit says of them, in parts of what they took.
        size = min(round(self.corner).bit_length(), _SIZES) - 1
        said = float(self._right[size, best] @ fits[best])
        as_said = said * _MOST_SURPRISE >= float(self._weight[size])
        worth_it = self.overhead_s < _MOST_OVERHEAD * self.decode_s  # so token_s is above 0
        self.free_tokens = round(self.corner) if as_said and worth_it else 0


def _fit(gram: _Floats, right: _Floats) -> _Floats:
    """The coefficients that fit best, in `_UNITS`; one that would be negative is 0."""
    scale = _PRIOR_WEIGHT * max(float(np.trace(gram)), 1e-12)
    gram = gram + scale * np.eye(4)
    right = right + scale * _PRIOR * _UNITS
    theta = np.linalg.solve(gram, right)
    kept = list(range(4))
    while (theta < 0.0).any():
        del kept[int(theta[kept].argmin())]
        theta = np.zeros(4)
        theta[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], right[kept])
    return theta
