"""Whose call is it, by what its client sends: the headers and fields of known agents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from vllm_saga.policy.hints import (
    DEFAULT_LIMITS,
    NOTHING,
    Declared,
    no_counts,
    read_flag,
    read_hint,
    read_text,
)
from vllm_saga.policy.identity import digest_id, short_id
from vllm_saga.policy.undecodable import UNDECODABLE

SESSION_HEADER = "x-session-id"
# Headers that name a session, in order of precedence, and whose they are.
_SESSION_HEADERS = (
    ("x-dynamo-session-id", "dynamo"),
    ("x-claude-code-session-id", "claude-code"),
    ("session-id", "codex"),
    ("session_id", "codex"),
    ("x-session-affinity", "opencode"),
    ("x-opencode-session", "opencode"),
)
_PARENT_HEADERS = ("x-dynamo-parent-session-id", "x-parent-session-id")
_LAST_HEADER = "x-dynamo-session-final"
# Sub-agents of these clients share their root's session id, and differ in this header.
_AGENT_HEADERS = {
    "claude-code": "x-claude-code-agent-id",
    "metadata": "x-claude-code-agent-id",
    "codex": "thread-id",
    "prompt_cache_key": "thread-id",
}
# Claude Code's `metadata.user_id`: `user_…_account_…_session_<id>`, or an object as JSON.
_USER_MARK = "_session_"
_MAX_USER_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator adds: headers (lower-case) that name a session, and who names the tenant.

    A tenant header has to be one that the operator's gateway sets over whatever a client sent.
    """

    session_headers: tuple[str, ...] = ()
    tenant_header: str = "x-tenant-id"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is.

    Attributes:
        session: its session's id as the engine will know it; None if nothing names one.
        source: who named it: "vllm" (vLLM's own fields, which are never overridden), "operator",
            "dynamo", "claude-code", "codex", "opencode", "prompt_cache_key", "metadata",
            "previous_response_id" (session is None: it is that of the earlier response, which
            `MessageLineage` knows), or "none".
        tenant: "" if nothing names one.
        parent: the session it was spawned by.
        agent: the sub-agent's own id, where its client tells it apart from its root.
        last: it says that this is its session's last call.
        conflict: two sources name different sessions; the first one holds.
    """

    session: str | None
    source: str
    tenant: str
    parent: str | None = None
    agent: str | None = None
    last: bool = False
    conflict: bool = False


def identify(headers: Mapping[str, str], body: Mapping[str, Any] | None, rules: Rules) -> Caller:
    """Whose call a request is. Never raises: what cannot be used counts as absent.

    Args:
        headers: by lower-case name.
        body: the request's JSON object, as far as it is known.
    """
    body = body if isinstance(body, Mapping) else {}
    xargs = body.get("vllm_xargs")
    xargs = xargs if isinstance(xargs, Mapping) else {}
    declared = _declared(xargs)
    named = [_Named("vllm", name) for name in _vllm_names(headers, body, xargs, declared)]
    named += [_thread(headers, *name) for name in _client_names(headers, body, rules)]
    first = named[0] if named else _unnamed(body)
    # A router that came before may have said what the client's own headers say.
    same = next((name for name in named if name.root and name.session == first.session), first)
    parent = _parent(headers, xargs, declared) or same.root
    return Caller(
        session=first.session,
        source=first.source,
        tenant=short_id(headers.get(rules.tenant_header, "").strip()),
        parent=parent if parent != first.session else None,
        agent=same.agent,
        last=_is_last(headers, xargs, declared),
        # A cache key may well be common to several sessions.
        conflict=any(
            first.session not in (name.session, name.root)
            for name in named
            if name.source != "prompt_cache_key"
        ),
    )


def is_of_another_site(headers: Mapping[str, str]) -> bool:
    """Whether a web page of another origin sends a request, in whosever browser it is open.

    Browsers say `Sec-Fetch-Site` to https and to their own machine, `Origin` with every POST, and
    let no page change either; who says neither is no browser. All other headers may be the page's:
    vLLM's default CORS lets it set keys, and hosts that somebody has forwarded.

    Args:
        headers: by any case, or by lower-case name.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site.strip().lower() not in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return False
    _, _, host = origin.strip().lower().partition("://")
    return not host or host != headers.get("host", "").strip().lower()


def read_odd(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body that msgspec refuses and vLLM's parser takes; None if it is none.

    Such are NaN, lone surrogates (half an emoji, where a client has cut a text) and UTF-16.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class _Named(NamedTuple):
    """A session by one source; of a sub-agent with the root session that its client shares."""

    source: str
    session: str | None
    root: str | None = None
    agent: str | None = None


def _declared(xargs: Mapping[str, Any]) -> Declared:
    sent = xargs.get("agent_hint")
    return NOTHING if sent is None else read_hint(sent, DEFAULT_LIMITS, no_counts())


def _vllm_names(
    headers: Mapping[str, str],
    body: Mapping[str, Any],
    xargs: Mapping[str, Any],
    declared: Declared,
) -> Iterator[str]:
    """Ids that reach the engine by themselves, in the order in which vLLM and saga take them."""
    own = (body.get("session_id"), headers.get(SESSION_HEADER), xargs.get("session_id"))
    for value in (*own, declared.session_id):
        name = read_text(value, no_counts())
        if name is not None:
            yield short_id(name)


def _client_names(
    headers: Mapping[str, str], body: Mapping[str, Any], rules: Rules
) -> Iterator[tuple[str, str]]:
    sent: list[tuple[str, object]] = [
        *(("operator", headers.get(header)) for header in rules.session_headers),
        *((who, headers.get(header)) for header, who in _SESSION_HEADERS),
        ("prompt_cache_key", body.get("prompt_cache_key")),
        ("metadata", _of_user(body.get("metadata"))),
    ]
    for who, value in sent:
        name = _header_safe(value)
        if name is not None:
            yield who, name


def _unnamed(body: Mapping[str, Any]) -> _Named:
    earlier = body.get("previous_response_id")
    return _Named("previous_response_id" if earlier and isinstance(earlier, str) else "none", None)


def _of_user(metadata: object) -> str | None:
    user = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    if not isinstance(user, str) or len(user) > _MAX_USER_CHARS:
        return None
    if user.startswith("{"):
        try:
            return msgspec.json.decode(user, type=_User).session_id
        except UNDECODABLE:
            return None
    _, mark, session = user.rpartition(_USER_MARK)
    return session if mark else None


class _User(msgspec.Struct):
    session_id: str | None = None


def _thread(headers: Mapping[str, str], source: str, session: str) -> _Named:
    """The sub-agent's session where its client tells it apart from the root's."""
    header = _AGENT_HEADERS.get(source)
    agent = _header_safe(headers.get(header)) if header is not None else None
    if agent is None or agent == session:
        return _Named(source, session)
    return _Named(source, short_id(f"{session}:{agent}"), session, agent)


def _parent(headers: Mapping[str, str], xargs: Mapping[str, Any], declared: Declared) -> str | None:
    own = read_text(xargs.get("saga_parent"), no_counts()) or declared.parent_id
    if own is not None:
        return short_id(own)
    found = (_header_safe(headers.get(header)) for header in _PARENT_HEADERS)
    return next(filter(None, found), None)


def _is_last(headers: Mapping[str, str], xargs: Mapping[str, Any], declared: Declared) -> bool:
    counts = no_counts()
    hinted = declared.hint is not None and declared.hint.last
    flags = (xargs.get("saga_last"), headers.get(_LAST_HEADER))
    return hinted or any(read_flag(flag, counts) for flag in flags)


def _header_safe(value: object) -> str | None:
    """An id that is fit for a header: as it is if it is plain text, else its digest."""
    name = (read_text(value, no_counts()) or "").strip()
    if not name:
        return None
    return short_id(name) if name.isascii() and name.isprintable() else digest_id(name)
