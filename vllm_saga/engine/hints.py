"""From a vLLM request to the policy's view of it: ids and hints, never an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.request import Request

from vllm_saga.policy.workflow import Arrival

SESSION = "session_id"
PARENT = "saga_parent"
LAST = "saga_last"


def read_arrival(request: Request, by_priority: bool) -> Arrival:
    """What the policy may know of a request (vllm/v1/request.py).

    `vllm_xargs` reach the engine as `sampling_params.extra_args`; a hint of a wrong type counts as
    absent, because a hint must never fail a request.
    """
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    hints: Mapping[str, Any] = extra if isinstance(extra, Mapping) else {}
    return Arrival(
        call_id=request.request_id,
        chain=request.block_hashes,
        prompt_tokens=request.num_prompt_tokens,
        tokens=request.prompt_token_ids if request.prompt_embeds is None else None,
        session_id=_text(getattr(request, "session_id", None)) or _text(hints.get(SESSION)),
        parent_id=_text(hints.get(PARENT)),
        tenant=request.cache_salt or "",
        priority=request.priority if by_priority else 0,
        last=_flag(hints.get(LAST)),
    )


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None


def _flag(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("1", "true", "yes")
    return value in (True, 1)
