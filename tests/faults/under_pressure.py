"""Agents on a real vLLM scheduler whose pool is too small for them: something is always held."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler

SESSIONS, TURNS, BLOCKS = 12, 5, 60
#: By this step calls are held, and others are computed.
BUSY_STEP = 30
_HINT = {"next_tool": "bash", "expected_gap_s": 0.2, "steps_left": 3, "deadline_s": 60}


def calls() -> dict[int, list[dict[str, Any]]]:
    """By step: sessions that call every 12 steps with a longer prompt; some hint, some end."""
    rng = random.Random(4)
    system = [rng.randrange(500) for _ in range(64)]
    contexts = {s: [*system, *(rng.randrange(500) for _ in range(40))] for s in range(SESSIONS)}
    found: dict[int, list[dict[str, Any]]] = {}
    for turn in range(TURNS):
        for session, context in contexts.items():
            call: dict[str, Any] = {
                "request_id": f"s{session}t{turn}",
                "tokens": list(context),
                "output": 5,
                "session_id": f"s{session}",
            }
            if session % 3 == 0:
                call["agent_hint"] = json.dumps(_HINT)
            if session % 4 == 0 and turn == TURNS - 1:
                call["saga_last"] = 1
            found.setdefault(turn * 12 + session % 7, []).append(call)
            context += [rng.randrange(500) for _ in range(30)]
    return found


def play(scheduler: Any, at_busy: Callable[[Any], None] = lambda scheduler: None) -> Driver:
    """All calls from their arrivals to their ends; `at_busy` is called once, amid them.

    Every ninth call is aborted as soon as it has arrived, held or not.
    """
    driver, arrivals = Driver(scheduler), calls()
    number = 0
    for step in range(max(arrivals) + 60):
        if step == BUSY_STEP:
            at_busy(scheduler)
        for call in arrivals.get(step, ()):
            number += 1
            driver.add(make_request(**call))
            if number % 9 == 0:
                driver.abort(call["request_id"])
        driver.step()
        driver.now += 0.02
    driver.drain(20_000, dt=0.02)
    return driver


@cache
def stock_outputs(overlapping: bool) -> dict[str, list[int]]:
    return play(make_scheduler("stock", blocks=BLOCKS, overlapping=overlapping)).outputs


@contextmanager
def errors_logged(*loggers: logging.Logger) -> Iterator[list[logging.LogRecord]]:
    """What these log as an error meanwhile."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]
    for logger in set(loggers):
        logger.addHandler(handler)
    try:
        yield records
    finally:
        for logger in set(loggers):
            logger.removeHandler(handler)


class Fault(Exception):
    pass


class Faulty:
    """In place of a function: works as it does, but for its `nth` call.

    late: that one does its work, and raises then.
    """

    def __init__(self, real: Callable[..., Any], nth: int, late: bool = False) -> None:
        self._real, self._nth, self._late = real, nth, late
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count != self._nth:
            return self._real(*args, **kwargs)
        if self._late:
            self._real(*args, **kwargs)
        raise Fault
