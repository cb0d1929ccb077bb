"""What a client declares of its workflow: read as far as it can be, bounded by the operator.

A hint is best effort. What cannot be used is passed over and counted under a fixed name, never
under a client's own words, so that the counts stay few; nothing here raises.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Outcome = Literal[
    "accepted",  # an `agent_hint` of which something was taken
    "clamped",  # a number beyond the operator's limits, taken as the limit
    "off",  # the operator takes no hints
    "too_long",
    "too_deep",
    "bad_json",
    "wrong_type",
    "bad_value",  # of the right type, but nothing that we know
    "not_finite",
    "negative",
    "unknown_key",
    "unsupported",  # defined upstream, not done here
    "priority",  # more is sooner at some senders, later at vLLM: never guessed
    "conflict",  # two ids for one thing: the first source holds
    "untrusted",  # a tenant from a source that the operator did not name
]
Counts = dict[Outcome, int]

_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_KEYS = frozenset(
    (
        "session_id",
        "parent_session_id",
        "cache_control",
        "next_tool",
        "expected_gap_s",
        "expected_tool_duration_ms",
        "steps_left",
        "deadline_s",
        "slo_factor",
        "last",
    )
)
_CACHE_KEYS = frozenset(("type", "ttl"))
_OTHER_KEYS: dict[object, Outcome] = {
    "context_management": "unsupported",
    "block_offset": "unsupported",
    "priority": "priority",
    "strict_priority": "priority",
}
_MAX_KEYS = 64
_MAX_BRACKETS = 64
_MAX_TOOLS = 16
_MAX_TOOL_CHARS = 128
_MAX_ID_BITS = 64
_DEFAULT_TTL_S = 300.0
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)?")
_UNIT_S = {None: 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


def no_counts() -> Counts:
    """A counter for every outcome, at 0."""
    return dict.fromkeys(_OUTCOMES, 0)


@dataclass(frozen=True, slots=True)
class HintLimits:
    """What the operator lets hints say.

    `max_chars` bounds an `agent_hint` sent as a JSON string. Neither a near deadline nor a small
    SLO factor may make a workflow as urgent as its client likes: both have a least value.
    """

    enabled: bool = True
    max_chars: int = 4096
    max_ttl_s: float = 3600.0
    max_gap_s: float = 3600.0
    max_steps: int = 10_000
    min_deadline_s: float = 1.0
    max_deadline_s: float = 86_400.0
    min_slo_factor: float = 1.0
    max_slo_factor: float = 100.0


DEFAULT_LIMITS = HintLimits()


@dataclass(frozen=True, slots=True)
class Hint:
    """What is declared of the time after a call; None where nothing is.

    Attributes:
        next_tool: the tool that runs next; parallel ones once each, sorted and joined with "+".
        gap_s: seconds until the workflow's next call, from the end of this one.
        steps_left: calls that the workflow makes after this one.
        deadline_s: seconds from this call's arrival in which the workflow is to be done.
        slo_factor: the completion wanted, in multiples of what it would take alone on the engine.
        ttl_s: seconds for which the context is worth keeping (Anthropic's and vLLM #52113's
            `cache_control`).
        last: this is the session's last call.
    """

    next_tool: str | None = None
    gap_s: float | None = None
    steps_left: int | None = None
    deadline_s: float | None = None
    slo_factor: float | None = None
    ttl_s: float | None = None
    last: bool = False


_EMPTY = Hint()


class Declared(NamedTuple):
    """An `agent_hint` as read; every part is None where it said nothing of use."""

    hint: Hint | None = None
    session_id: str | None = None
    parent_id: str | None = None


NOTHING = Declared()


def read_hint(sent: object, limits: HintLimits, counts: Counts) -> Declared:
    """Read an `agent_hint`: an object, or the JSON text of one.

    The shape is that of vLLM's RFC #52113 (`session_id`, `parent_session_id`, `cache_control`) with
    `next_tool`, `expected_gap_s` (or `expected_tool_duration_ms` as in SGLang's RFC #24656, if that
    is missing), `steps_left`, `deadline_s`, `slo_factor` and `last`. `counts` is added to.
    """
    if not limits.enabled:
        counts["off"] += 1
        return NOTHING
    sent = _object(sent, limits, counts)
    if sent is None:
        return NOTHING
    get = sent.get
    gap_s = read_number(get("expected_gap_s"), 0.0, limits.max_gap_s, counts)
    gap_ms = read_number(get("expected_tool_duration_ms"), 0.0, limits.max_gap_s * 1e3, counts)
    if gap_s is None and gap_ms is not None:
        gap_s = min(gap_ms / 1e3, limits.max_gap_s)
    hint = Hint(
        next_tool=_tool(get("next_tool"), counts),
        gap_s=gap_s,
        steps_left=_whole(get("steps_left"), limits.max_steps, counts),
        deadline_s=read_number(
            get("deadline_s"), limits.min_deadline_s, limits.max_deadline_s, counts
        ),
        slo_factor=read_number(
            get("slo_factor"), limits.min_slo_factor, limits.max_slo_factor, counts
        ),
        ttl_s=_ttl_s(get("cache_control"), limits, counts),
        last=read_flag(get("last"), counts),
    )
    declared = Declared(
        hint if hint != _EMPTY else None,
        read_text(get("session_id"), counts),
        read_text(get("parent_session_id"), counts),
    )
    _count_others(sent, _KEYS, counts)
    counts["accepted"] += declared != NOTHING
    return declared


def read_text(value: object, counts: Counts) -> str | None:
    """An id: text, or a whole number as text; None if empty, or, counted, if it is neither."""
    if value is None:
        return None
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool) or not isinstance(value, int):
        counts["wrong_type"] += 1
    elif value.bit_length() > _MAX_ID_BITS:
        counts["too_long"] += 1
    else:
        return str(value)
    return None


def read_flag(value: object, counts: Counts) -> bool:
    """Yes or no, as a bool, as 0 or 1 (what vLLM makes of a bool in `vllm_xargs`), or in words."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str):
        found = _FLAGS.get(value.strip().lower()) if len(value) < 16 else None
    elif isinstance(value, (int, float)):
        found = bool(value) if value in (0, 1) else None
    else:
        counts["wrong_type"] += 1
        return False
    counts["bad_value"] += found is None
    return bool(found)


def read_number(value: object, low: float, high: float, counts: Counts) -> float | None:
    """A number of at least 0, moved into [low, high]; None, counted, if it is not one."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        counts["wrong_type"] += 1
    elif isinstance(value, float) and not math.isfinite(value):
        counts["not_finite"] += 1
    elif value < 0:
        counts["negative"] += 1
    else:
        # Compared before it is converted: an int may be too large for a float.
        within = min(max(value, low), high)
        counts["clamped"] += within != value
        return float(within)
    return None


def _whole(value: object, high: int, counts: Counts) -> int | None:
    number = read_number(value, 0.0, high, counts)
    if number is None or number.is_integer():
        return None if number is None else int(number)
    counts["bad_value"] += 1
    return None


def _object(sent: object, limits: HintLimits, counts: Counts) -> dict[Any, Any] | None:
    if isinstance(sent, str):
        if len(sent) > limits.max_chars:
            counts["too_long"] += 1
            return None
        # json's own bound on nesting is the interpreter's stack.
        if sent.count("{") + sent.count("[") > _MAX_BRACKETS:
            counts["too_deep"] += 1
            return None
        try:
            sent = json.loads(sent)
        except (ValueError, RecursionError):
            counts["bad_json"] += 1
            return None
    if not isinstance(sent, dict):
        counts["wrong_type"] += 1
        return None
    if len(sent) > _MAX_KEYS:
        counts["too_long"] += 1
        return None
    return sent


def _tool(value: object, counts: Counts) -> str | None:
    """One bad name spoils the list: the others would name another set of tools."""
    if value is None or value == "":
        return None
    sent: Sequence[object] = value if isinstance(value, (list, tuple)) else (value,)
    names: set[str] = set()
    if len(sent) > _MAX_TOOLS:
        counts["too_long"] += 1
        return None
    for item in sent:
        if not isinstance(item, str):
            counts["wrong_type"] += 1
            return None
        if len(item) > _MAX_TOOL_CHARS:
            counts["too_long"] += 1
            return None
        names.update(name.strip() for name in item.split("+"))
    if not names or not all(name and name.isprintable() for name in names):
        counts["bad_value"] += 1
        return None
    return "+".join(sorted(names))


def _ttl_s(sent: object, limits: HintLimits, counts: Counts) -> float | None:
    if sent is None:
        return None
    if not isinstance(sent, dict):
        counts["wrong_type"] += 1
        return None
    if len(sent) > _MAX_KEYS:
        counts["too_long"] += 1
        return None
    _count_others(sent, _CACHE_KEYS, counts)
    if sent.get("type") not in (None, "ephemeral"):
        counts["bad_value"] += 1
        return None
    ttl = sent.get("ttl")
    if ttl is None:
        return min(_DEFAULT_TTL_S, limits.max_ttl_s)
    if isinstance(ttl, str):
        match = _DURATION.fullmatch(ttl)
        if match is None:
            counts["bad_value"] += 1
            return None
        ttl = float(match[1]) * _UNIT_S[match[2]]
    return read_number(ttl, 0.0, limits.max_ttl_s, counts)


def _count_others(sent: dict[Any, Any], known: frozenset[str], counts: Counts) -> None:
    for key in sent.keys() - known:
        if sent[key] is not None:
            counts[_OTHER_KEYS.get(key, "unknown_key")] += 1
