"""For policies that may look at a session's future: what is left of it, and when to ask again."""

from __future__ import annotations

from collections.abc import Callable

from vllm_saga.simulator.records import LiveSession, Thread


class Lookahead:
    """Keeps a value per thread that can change only when a call of its session starts or ends.

    value: computes it, given the thread and the index of its session's first unfinished call.
    """

    def __init__(self, value: Callable[[Thread, int], float]) -> None:
        self._value = value
        self._values: dict[LiveSession, dict[Thread, float]] = {}
        self._first_open: dict[LiveSession, int] = {}

    def of(self, thread: Thread) -> float:
        session = thread.session
        values = self._values.setdefault(session, {})
        value = values.get(thread)
        if value is None:
            value = values[thread] = self._value(thread, self._open_from(session))
        return value

    def changed(self, session: LiveSession) -> None:
        """A call of the session was issued or has ended."""
        self._values.pop(session, None)

    def forget(self, session: LiveSession) -> None:
        self._values.pop(session, None)
        self._first_open.pop(session, None)

    def _open_from(self, session: LiveSession) -> int:
        index = self._first_open.get(session, 0)
        calls = session.calls
        while index < len(calls):
            call = calls[index]
            if call is None or call.finished_s is None:
                break
            index += 1
        self._first_open[session] = index
        return index
