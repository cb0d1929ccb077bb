"""Typed decoding of trace files with errors that name the place."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vllm_saga.policy.undecodable import UNDECODABLE
from vllm_saga.simulator.trace import TraceError

T = TypeVar("T")


def decode(decoder: msgspec.json.Decoder[T], data: bytes, where: str) -> T:
    """Decode one object; raises `TraceError` as `where: field: what is wrong`."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$.")
        field = f"{place.rstrip('`')}: " if place else ""
        raise TraceError(f"{where}: {field}{text}") from error
    except UNDECODABLE as error:
        raise TraceError(f"{where}: not a JSON object: {error}") from error
