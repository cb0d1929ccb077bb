"""How far a class's clients may be believed: what they declared against what then happened."""

from __future__ import annotations

import math

_ENOUGH = 8.0
_WINDOW = 200.0
# Declared has to be so much better than learned before it counts.
_BETTER = 0.8
# One wild value says no more than a value wrong by this factor.
_WORST = math.log(30.0)
_LEAST = 0.05


class Declared:
    """Whether the values that clients declare are nearer to the truth than learned ones.

    Errors are taken in the logarithm, so that a factor of ten counts the same either way. Nothing
    is believed before eight comparisons, here or else at `parent`; they fade over about 200.
    """

    def __init__(self, parent: Declared | None = None) -> None:
        self._parent = parent
        self._count = 0.0
        self._declared = 0.0
        self._learned = 0.0

    def observe(self, declared: float, learned: float, actual: float) -> None:
        """A value came out as `actual`, where clients had said `declared` and we `learned`."""
        if self._parent is not None:
            self._parent.observe(declared, learned, actual)
        if self._count >= _WINDOW:
            self._count, self._declared, self._learned = (
                0.5 * value for value in (self._count, self._declared, self._learned)
            )
        self._count += 1.0
        self._declared += _error(declared, actual)
        self._learned += _error(learned, actual)

    @property
    def believed(self) -> bool:
        if self._count < _ENOUGH:
            return self._parent is not None and self._parent.believed
        return self._declared < _BETTER * self._learned


def _error(said: float, actual: float) -> float:
    return min(abs(math.log(max(said, _LEAST) / max(actual, _LEAST))), _WORST)
