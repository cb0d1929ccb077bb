"""Running means and variances that forget."""

from __future__ import annotations

from vllm_saga.policy.records import MeanRecord

WINDOW = 500.0


class RunningMean:
    """A mean over about the last 500 values that starts from its parent's, at the weight of one.

    The variance is that of the same mixture: what was seen, and one value as the parent has them.
    """

    def __init__(self, parent: RunningMean | None = None, start: float = 0.0) -> None:
        self._parent = parent
        self._start = start
        self._sum = 0.0
        self._squares = 0.0
        self._weight = 0.0

    def observe(self, value: float) -> None:
        """Adds a value, to the parent's as well."""
        if self._parent is not None:
            self._parent.observe(value)
        if self._weight >= WINDOW:
            self._sum *= 0.5
            self._squares *= 0.5
            self._weight *= 0.5
        self._sum += value
        self._squares += value * value
        self._weight += 1.0

    @property
    def mean(self) -> float:
        start = self._start if self._parent is None else self._parent.mean
        return (self._sum + start) / (self._weight + 1.0)

    @property
    def variance(self) -> float:
        """Mean squared distance from `mean`, in the square of the values' unit."""
        return max(self._mean_square() - self.mean**2, 0.0)

    def _mean_square(self) -> float:
        start = self._start**2 if self._parent is None else self._parent._mean_square()
        return (self._squares + start) / (self._weight + 1.0)

    def record(self) -> MeanRecord:
        """All there is to know but for the parent, for `restore`."""
        return MeanRecord(self._sum, self._squares, self._weight)

    def restore(self, record: MeanRecord) -> None:
        self._sum, self._squares, self._weight = record.sum, record.squares, record.weight
