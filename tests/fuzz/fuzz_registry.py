"""The fuzzers by name, and what holds for each of them: no other error, no hang, no flood."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

#: One input may take so long, and so much more memory, whatever the machine has to do besides.
MOST_S = 20
MOST_BYTES = 512 << 20

Check = Callable[[Any], None]


class Excess(AssertionError):
    """An input took too much time or memory."""


@dataclass(frozen=True)
class Target:
    """A parser of what comes from outside, with inputs for it.

    check: reads one input; raises if the parser raises what it does not document, or lies.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    check: Check

    def run(self, given: Any) -> None:
        before = _peak_bytes()
        with _alarm():
            self.check(given)
        if _peak_bytes() - before > MOST_BYTES:
            raise Excess(f"{_peak_bytes() - before} bytes of memory for one input")


TARGETS: dict[str, Target] = {}


def fuzzes(name: str, inputs: st.SearchStrategy[Any]) -> Callable[[Check], Check]:
    """Enters a check under `name`."""

    def enter(check: Check) -> Check:
        assert name not in TARGETS
        TARGETS[name] = Target(name, inputs, check)
        return check

    return enter


class _alarm:
    """Raises in the main thread when it takes longer than `MOST_S`."""

    def __enter__(self) -> None:
        self._on = threading.current_thread() is threading.main_thread()
        if self._on:
            self._before = signal.signal(signal.SIGALRM, self._ring)
            signal.alarm(MOST_S)

    def __exit__(self, *error: object) -> None:
        if self._on:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _ring(number: int, frame: object) -> None:
        raise Excess(f"more than {MOST_S} s for one input")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
