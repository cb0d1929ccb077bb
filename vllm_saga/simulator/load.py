"""How sessions arrive: so many at a time, or at so many per minute.

    closed:N           N lanes; a lane starts its next session when one ends
    overcommit:X       as closed, with the lanes whose contexts add up to X times the KV pool
    open:RATE          Poisson arrivals, RATE sessions per minute for the whole cluster
    open:autoP         the same at P % of what stock vLLM can carry, which the caller measures
    open:trace         the sessions' own `arrival_s`
    open:FILE          arrivals from a file: JSON lines with `arrival_s`, or one number per line (s)

The open ones take options behind a comma: `cv=3` draws gamma inter-arrivals with that coefficient
of variation (for RATE and autoP), `rate=R` or `rate=autoP` rescales `trace` or FILE to a mean rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from vllm_saga.simulator.trace import Call, Session

_FORMS = "closed:N, overcommit:X, open:RATE, open:autoP, open:trace or open:FILE"
_AUTO = "auto"


class LoadError(ValueError):
    """A load that cannot be used; the message says what is allowed."""


@dataclass(frozen=True, slots=True)
class Closed:
    """`lanes` sessions at a time."""

    lanes: int


@dataclass(frozen=True, slots=True)
class Overcommit:
    """As many sessions at a time as fill the KV pool `factor` times."""

    factor: float

    def lanes(
        self,
        sessions: Sequence[Session],
        kv_tokens: int,
        model_s: Callable[[Call], float] | None = None,
    ) -> int:
        """Lanes for a pool of `kv_tokens`: rounded to the nearest whole number, at least 1.

        `model_s`: see `mean_context_tokens`.
        """
        return max(1, round(self.factor * kv_tokens / mean_context_tokens(sessions, model_s)))


@dataclass(frozen=True, slots=True)
class Open:
    """Arrivals that do not wait for anything.

    Drawn at `rate_per_min` sessions per minute with coefficient of variation `cv`; or, with `trace`
    or `file`, recorded ones, rescaled to the mean rate `rate_per_min` where that is given.
    """

    rate_per_min: float | None = None
    cv: float = 1.0
    trace: bool = False
    file: Path | None = None

    def arrivals(self, sessions: Sequence[Session], seed: int) -> list[float]:
        """Arrival of each session in seconds: in order, but with `trace` each session its own.

        Drawn ones depend on the seed alone. Raises `LoadError` if recorded ones are missing or too
        few.
        """
        if self.trace:
            return self._rescaled([_own_arrival(session) for session in sessions])
        if self.file is not None:
            recorded = read_arrivals(self.file)
            if len(recorded) < len(sessions):
                raise LoadError(
                    f"{self.file}: holds {len(recorded)} arrivals for {len(sessions)} sessions; "
                    "play fewer sessions or give a longer file"
                )
            return self._rescaled(recorded[: len(sessions)])
        if self.rate_per_min is None:
            raise LoadError("an open load needs a rate, a file or a trace with arrivals")
        rng = random.Random(f"arrivals/{seed}")
        shape = self.cv**-2
        now_s, out = 0.0, []
        for _ in sessions:
            now_s += rng.gammavariate(shape, 60 / self.rate_per_min / shape)
            out.append(now_s)
        return out

    def _rescaled(self, arrivals: list[float]) -> list[float]:
        """Arrivals from 0 on with the mean rate asked for; as they are if none is."""
        if self.rate_per_min is None or not arrivals:
            return arrivals
        first, last = min(arrivals), max(arrivals)
        if first == last:
            return [0.0] * len(arrivals)
        scale = 60 / self.rate_per_min * (len(arrivals) - 1) / (last - first)
        return [(arrival - first) * scale for arrival in arrivals]


@dataclass(frozen=True, slots=True)
class AutoOpen:
    """An open load at `percent` of what stock vLLM can carry; `shape` says what else is asked."""

    percent: float
    shape: Open = Open()

    def at(self, saturation_per_min: float) -> Open:
        """The open load, once stock's saturation is known (sessions per minute)."""
        return replace(self.shape, rate_per_min=saturation_per_min * self.percent / 100)


Load = Closed | Open | AutoOpen | Overcommit


def mean_context_tokens(
    sessions: Sequence[Session], model_s: Callable[[Call], float] | None = None
) -> float:
    """Time-mean context of a live session that never waits: long sessions count for longer.

    `model_s` gives the seconds of a call on the hardware in question; without it, the recorded or
    estimated ones count.
    """
    if model_s is not None:
        sessions = [_timed(session, model_s) for session in sessions]
    total_s = sum(session.ideal_s for session in sessions)
    if not total_s:
        raise LoadError("sessions that take no time have no mean context")
    return sum(session.context_token_seconds for session in sessions) / total_s


def _timed(session: Session, model_s: Callable[[Call], float]) -> Session:
    calls = tuple(msgspec.structs.replace(call, llm_s=model_s(call)) for call in session.calls)
    return msgspec.structs.replace(session, calls=calls)


def _own_arrival(session: Session) -> float:
    if session.arrival_s is None:
        raise LoadError(
            f"session {session.session_id!r} has no arrival_s, which open:trace needs; "
            "give a rate or a file of arrivals"
        )
    return session.arrival_s


def read_arrivals(path: Path) -> list[float]:
    """Arrivals of a file in seconds, in order; raises `LoadError` naming file and line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: cannot read the arrivals: {error}") from error
    out = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
            arrival = float(value["arrival_s"] if isinstance(value, dict) else value)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            arrival = math.nan
        if not 0 <= arrival < math.inf:
            raise LoadError(
                f"{path}:{number}: expected seconds, or an object with arrival_s, not {line[:60]!r}"
            )
        out.append(arrival)
    return sorted(out)


def parse(text: str) -> Load:
    """Read a load as the user writes it; raises `LoadError` that says what is allowed."""
    kind, _, rest = text.partition(":")
    if kind == "closed":
        lanes = _number(text, "N", rest)
        if lanes != int(lanes):
            raise LoadError(f"{text!r}: N must be a whole number of lanes")
        return Closed(int(lanes))
    if kind == "overcommit":
        return Overcommit(_number(text, "X", rest))
    if kind == "open" and rest:
        return _parse_open(text, rest)
    raise LoadError(f"{text!r} is not a load; allowed are {_FORMS}")


def _parse_open(text: str, rest: str) -> Open | AutoOpen:
    what, *extra = rest.split(",")
    options = dict(_option(text, option) for option in extra)
    rate = what
    if what == "trace":
        shape, rate, allowed = Open(trace=True), options.get("rate", ""), {"rate"}
    elif _is_rate(what):
        shape, allowed = Open(), {"cv"}
        if "cv" in options:
            shape = Open(cv=_number(text, "cv", options["cv"]))
    else:
        shape, rate, allowed = Open(file=Path(what)), options.get("rate", ""), {"rate"}
    for name in options:
        if name not in allowed:
            raise LoadError(f"{text!r}: {name} is no option here; allowed is {allowed.pop()}=")
    if not rate:
        return shape
    if rate.startswith(_AUTO):
        return AutoOpen(_number(text, "P", rate.removeprefix(_AUTO).rstrip("%")), shape)
    return replace(shape, rate_per_min=_number(text, "rate", rate))


def _is_rate(text: str) -> bool:
    """Whether this is meant as a rate, not as a file."""
    digits = text.removeprefix(_AUTO).rstrip("%")
    try:
        float(digits)
    except ValueError:
        return False
    return True


def _option(text: str, option: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not equals:
        raise LoadError(f"{text!r}: options have the form name=value, not {option!r}")
    return name, value


def _number(text: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise LoadError(f"{text!r}: {name} must be a number above 0, not {value!r}")
    return number
