"""What Ray Serve passes to a request router, read as the edge reads HTTP, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_saga.policy.clients import SESSION_HEADER
from vllm_saga.router.edge import Recognised

# Methods of Ray's LLM server that compute on a prompt; with direct streaming it is "__call__".
_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "__call__": "/v1/completions",
}
# The fields of a body that identity and the size of a prompt are read from.
_FIELDS = (
    "session_id",
    "vllm_xargs",
    "prompt_cache_key",
    "metadata",
    "cache_salt",
    "previous_response_id",
    "system",
    "instructions",
    "tools",
    "messages",
    "input",
    "prompt",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A call as `router.edge.Edge` takes it; headers by lower-case name."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, object]


def read(method: str, args: Sequence[Any], session_id: str) -> Asked:
    """What a call of a Ray Serve LLM deployment asks for.

    Args:
        method: of the deployment's class (`RequestMetadata.call_method`).
        args: the parsed request and Ray's `RawRequestInfo`; with direct streaming the body alone,
            as a namespace, or nothing.
        session_id: what Ray read from its own session header, "" for nothing.
    """
    payload = args[0] if args else None
    sent = ((name, getattr(payload, name, None)) for name in _FIELDS)
    body = {name: _plain(value) for name, value in sent if value is not None}
    raw = _headers(args)
    headers = {name.lower(): value for name, value in raw.items()} if raw is not None else {}
    if session_id:
        headers.setdefault(SESSION_HEADER, session_id)
    return Asked(_PATHS.get(method, f"/{method}"), headers, body)


def tell(args: Sequence[Any], recognised: Recognised) -> None:
    """Let the engine know the caller as this router does: its id, its parent, its end.

    Ray calls the engine without vLLM's middlewares, so that nobody else does. Nothing can be told
    with direct streaming: there the request itself is not passed through the router.
    """
    raw = _headers(args)
    if raw is not None and recognised.forward is not None:
        raw[SESSION_HEADER] = recognised.forward
    payload: Any = args[0] if args else None
    if isinstance(payload, SimpleNamespace) or not hasattr(payload, "vllm_xargs"):
        return
    arrival, more = recognised.arrival, dict[str, object]()
    if arrival.parent is not None:
        more["saga_parent"] = arrival.parent[1]
    if arrival.last:
        more["saga_last"] = 1
    if more:
        payload.vllm_xargs = {**(payload.vllm_xargs or {}), **more}


def _headers(args: Sequence[Any]) -> dict[str, str] | None:
    headers = getattr(args[1], "headers", None) if len(args) > 1 else None
    return headers if isinstance(headers, dict) else None


def _plain(value: Any) -> Any:
    """Pydantic objects, such as tools are, as the JSON they came from."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value] if not _is_tokens(value) else value
    dump = getattr(value, "model_dump", None)
    return dump(exclude_unset=True) if dump is not None else value


def _is_tokens(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], int)
