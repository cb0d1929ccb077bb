"""How a simulated call tells vLLM its session."""

from __future__ import annotations

from inspect import signature
from typing import Any

from vllm.v1.request import Request

_HAS_SESSION = "session_id" in signature(Request.__init__).parameters


def name_session(
    session_id: str | None, extra_args: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Arguments of `Request`, and `extra_args` of its `SamplingParams`.

    vLLM 0.26 has no session id of its own: there it goes where clients' `vllm_xargs` go.
    """
    if session_id is None:
        return {}, extra_args or None
    named = {"session_id": session_id}
    if _HAS_SESSION:
        return named, extra_args or None
    return {}, {**(extra_args or {}), **named}
