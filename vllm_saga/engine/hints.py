"""From a vLLM request to the policy's view of it: ids and hints, never an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vllm.v1.request import Request

from vllm_saga.policy.hints import (
    DEFAULT_LIMITS,
    NOTHING,
    Counts,
    Declared,
    HintLimits,
    read_flag,
    read_hint,
    read_text,
)
from vllm_saga.policy.identity import short_id
from vllm_saga.policy.workflow import Arrival

SESSION = "session_id"
PARENT = "saga_parent"
LAST = "saga_last"
TENANT = "saga_tenant"
AGENT_HINT = "agent_hint"

TenantSource = Literal["cache_salt", "saga_tenant", "none"]

_NONE: Mapping[str, Any] = {}


def read_arrival(
    request: Request,
    by_priority: bool,
    counts: Counts,
    limits: HintLimits = DEFAULT_LIMITS,
    tenant_source: TenantSource = "cache_salt",
) -> Arrival:
    """What the policy may know of a request (vllm/v1/request.py).

    `vllm_xargs` reach the engine as `sampling_params.extra_args`. An id is vLLM's own, else that of
    its flat key, else that of `agent_hint`. A hint that cannot be used counts as absent, because a
    hint must never fail a request; `counts` says how often and why.
    """
    extra = _extra(request)
    declared = NOTHING
    session_id = read_text(getattr(request, "session_id", None), counts)
    parent_id, last = None, False
    if extra:
        sent = extra.get(AGENT_HINT)
        declared = NOTHING if sent is None else read_hint(sent, limits, counts)
        flat_id = read_text(extra.get(SESSION), counts)
        session_id = _first(counts, session_id, flat_id, declared.session_id)
        parent_id = _first(counts, read_text(extra.get(PARENT), counts), declared.parent_id)
        last = read_flag(extra.get(LAST), counts) or _is_last(declared)
    return Arrival(
        call_id=request.request_id,
        chain=request.block_hashes,
        prompt_tokens=request.num_prompt_tokens,
        tokens=request.prompt_token_ids if request.prompt_embeds is None else None,
        session_id=session_id,
        parent_id=parent_id,
        tenant=read_tenant(request, tenant_source, counts),
        priority=request.priority if by_priority else 0,
        last=last,
        hint=declared.hint,
    )


def read_tenant(request: Request, source: TenantSource, counts: Counts) -> str:
    """Whose request it is, from the one source that the operator vouches for; "" where it is mute.

    "cache_salt": the request's salt. "saga_tenant": the key of that name in `vllm_xargs`, which a
    gateway has to set on every request, over whatever the client sent. "none": one tenant for all.
    A huge name counts as its digest: tables remember it for as long as the session.
    """
    sent = _extra(request).get(TENANT)
    if source == "saga_tenant":
        return short_id(read_text(sent, counts) or "")
    if sent is not None:
        counts["untrusted"] += 1
    return short_id(request.cache_salt or "") if source == "cache_salt" else ""


def _extra(request: Request) -> Mapping[str, Any]:
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    return extra if isinstance(extra, Mapping) else _NONE


def _is_last(declared: Declared) -> bool:
    return declared.hint is not None and declared.hint.last


def _first(counts: Counts, *ids: str | None) -> str | None:
    """The first id that there is; every other one is counted."""
    chosen = None
    for name in ids:
        if chosen is None:
            chosen = name
        elif name is not None and name != chosen:
            counts["conflict"] += 1
    return chosen
