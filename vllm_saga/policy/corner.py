"""The roofline's corner of this engine: how many tokens a step computes for nothing."""

from __future__ import annotations

import numpy as np

# What is learned of prefills comes from steps so many times longer than one that decodes.
_LONG = 3.0
_FEWEST_DECODES, _FEWEST_PREFILLS = 32, 16
_FORGET = 0.998
# The line through the long steps is believed if their lengths differ (relative variance), if it
# leaves more than half of a decode step to the weights, and if steps in between are as it says.
_SPREAD = 0.01
_MOST_OVERHEAD = 0.5
_MOST_SURPRISE = 1.4
_SURPRISE_SHARE = 0.05


class Corner:
    """Learns where a step turns from reading the weights to multiplying with them.

    Up to `free_tokens` new tokens a step takes what a step of one token does, because reading the
    weights hides the arithmetic (roofline: Williams et al., CACM 2009). So a decode step has room
    for so many tokens of prefill (chunked prefill, Sarathi-Serve: Agrawal et al., OSDI 2024), and
    every further one stretches the steps of all who decode.

    Seconds are those of matrix products and of what each step costs in any case: without attention.

    Attributes:
        decode_s: seconds of a step that only decodes.
        overhead_s: seconds of a step before it has computed a token: the intercept of the long
            steps, between 0 and `decode_s`.
        token_s: seconds of a token more, in a long step.
        surprise: how many times longer than these say the steps in between take, in the mean.
        known: whether steps of both kinds were seen, enough of them and different enough.
    """

    def __init__(self) -> None:
        self.decode_s = 0.0
        self.overhead_s = 0.0
        self.token_s = 0.0
        self.surprise = 1.0
        self._decodes = 0
        self._prefills = 0
        # Sums over long steps: 1, tokens, tokens^2, seconds, tokens x seconds.
        self._sums = np.zeros(5)

    @property
    def known(self) -> bool:
        enough = self._decodes >= _FEWEST_DECODES and self._prefills >= _FEWEST_PREFILLS
        return enough and self.token_s > 0.0

    @property
    def free_tokens(self) -> int:
        """New tokens of a step that take no longer than one; 0 if there are few, or none knows.

        A machine whose steps are mostly overhead, or on which every token costs, has none.
        """
        if not self.known or self.surprise > _MOST_SURPRISE:
            return 0
        if self.overhead_s > _MOST_OVERHEAD * self.decode_s:
            return 0
        return round((self.decode_s - self.overhead_s) / self.token_s)

    def observe(self, new: int, calls: int, seconds: float) -> None:
        """A step computed `new` tokens for `calls` calls in `seconds`, attention aside."""
        if new <= calls:
            self._decodes += 1
            # The mean of the first ones, then of about the last 500; a pause counts for little.
            share = max(1.0 / self._decodes, 1.0 - _FORGET)
            error = seconds - self.decode_s
            if self._decodes > 1:
                error = min(error, 2.0 * self.decode_s)
            self.decode_s += share * error
        elif seconds > _LONG * self.decode_s > 0.0:
            self._prefills += 1
            x = np.array((1.0, new, new * new, seconds, new * seconds))
            # Relative errors count.
            self._sums = _FORGET * self._sums + x / (seconds * seconds)
            self._solve()
        elif self.known:
            said_s = max(self.decode_s, self.overhead_s + self.token_s * new)
            self.surprise += _SURPRISE_SHARE * (seconds / said_s - self.surprise)

    def _solve(self) -> None:
        """The line through the long steps; its intercept is a part of a decode step."""
        ones, tokens, squares, seconds, products = map(float, self._sums)
        spread = ones * squares - tokens * tokens
        if spread <= _SPREAD * ones * squares:
            self.token_s = 0.0
            return
        token_s = (ones * products - tokens * seconds) / spread
        overhead_s = (seconds - token_s * tokens) / ones
        if not 0.0 <= overhead_s <= self.decode_s:
            overhead_s = min(max(overhead_s, 0.0), self.decode_s)
            token_s = (products - overhead_s * tokens) / squares
        self.overhead_s, self.token_s = overhead_s, token_s
