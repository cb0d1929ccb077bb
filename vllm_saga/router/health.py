"""Whether calls may be sent to a backend: what probes find, and a circuit breaker for calls."""

from __future__ import annotations

_LONGEST_BREAK = 6
"""Times the first break; each break that fails again is twice as long as the last one."""


class Health:
    """Probes say if a backend is up; the breaker opens while calls fail although it seems to be.

    A backend is down until a probe has found it. Only failures to reach it count for the breaker:
    an error that it answers itself says nothing of the next call.
    """

    def __init__(
        self,
        failures: int = 3,
        successes: int = 1,
        breaker_failures: int = 5,
        breaker_s: float = 10,
    ) -> None:
        self.up = False
        self._failures = failures
        self._successes = successes
        self._breaker_failures = breaker_failures
        self._breaker_s = breaker_s
        self._probes_in_row = 0
        self._calls_failed = 0
        self._break_s = breaker_s
        self._open_until: float | None = None

    def probed(self, found: bool, refused: bool = False) -> None:
        """A probe has ended. `refused`: nobody listens there, which needs no second probe."""
        if found == self.up:
            self._probes_in_row = 0
            return
        self._probes_in_row += 1
        if refused or self._probes_in_row >= (self._successes if found else self._failures):
            self.up = found
            self._probes_in_row = 0
            if found:
                self.call_succeeded()

    def call_failed(self, now: float) -> None:
        """The backend could not be reached, or broke off."""
        self._calls_failed += 1
        if self._open_until is None:
            if self._calls_failed >= self._breaker_failures:
                self._open_until = now + self._break_s
        elif now >= self._open_until:
            self._break_s = min(2 * self._break_s, _LONGEST_BREAK * self._breaker_s)
            self._open_until = now + self._break_s

    def call_succeeded(self) -> None:
        """The backend has answered a call."""
        self._calls_failed = 0
        self._open_until = None
        self._break_s = self._breaker_s

    def accepting(self, now: float) -> bool:
        """Whether calls may be sent; after a break they are tried again."""
        return self.up and (self._open_until is None or now >= self._open_until)

    def state(self, now: float) -> str:
        """For people: up, down, or broken (up, but calls fail)."""
        return "down" if not self.up else "up" if self.accepting(now) else "broken"
