"""A request's JSON body, at the edge: the few fields read, and one added, the rest untouched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_saga.policy.clients import read_odd
from vllm_saga.policy.undecodable import UNDECODABLE

XARGS = "vllm_xargs"


class _Known(msgspec.Struct):
    """What identity may need of a body; everything else is skipped unread."""

    session_id: Any = None
    vllm_xargs: Any = None
    prompt_cache_key: Any = None
    metadata: Any = None
    previous_response_id: Any = None


_decoder = msgspec.json.Decoder(_Known)


class JsonBody:
    """The JSON object in `data`.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._odd: dict[str, Any] | None = None
        self.fields: Mapping[str, Any]
        try:
            self.fields = msgspec.structs.asdict(_decoder.decode(data))
        except UNDECODABLE:
            self._odd = read_odd(data)
            if self._odd is None:
                raise ValueError("not a JSON object") from None
            self.fields = self._odd

    @property
    def xargs(self) -> Mapping[str, Any]:
        """Its `vllm_xargs`; empty if it has none that could be extended."""
        sent = self.fields.get(XARGS)
        return sent if isinstance(sent, dict) else {}

    def with_xargs(self, more: Mapping[str, Any]) -> bytes:
        """The body with `more` in its `vllm_xargs`, appended: of equal keys the last one counts."""
        xargs = {**self.xargs, **more}
        if self._odd is not None:
            return json.dumps({**self._odd, XARGS: xargs}).encode()
        head = self._data.strip()[:-1].rstrip()
        comma = "" if head == b"{" else ","
        return head + f'{comma}"{XARGS}":{json.dumps(xargs)}}}'.encode()
