"""Which headers pass through the router, and which belong to one connection only."""

from __future__ import annotations

from collections.abc import Mapping

from multidict import CIMultiDict, CIMultiDictProxy

BACKEND_HEADER = "x-saga-backend"
DECISION_HEADER = "x-saga-decision"
SESSION_HEADER = "X-Session-ID"

_OF_CONNECTION = (
    "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization",
    "TE", "Trailer", "Transfer-Encoding", "Upgrade",
)  # fmt: skip
_OF_REQUEST = ("Host", "Expect")


def _passing(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    passing = CIMultiDict(headers)
    for value in headers.getall("Connection", ()):
        for name in value.split(","):
            passing.popall(name.strip(), None)
    for name in _OF_CONNECTION:
        passing.popall(name, None)
    return passing


def for_backend(
    headers: CIMultiDictProxy[str],
    own: Mapping[str, str],
    session: str | None,
    api_key: str | None,
) -> CIMultiDict[str]:
    """What the backend is sent: `own` are the headers that choose it (its rank)."""
    passing = _passing(headers)
    for name in _OF_REQUEST:
        passing.popall(name, None)
    for name, value in own.items():
        passing[name] = value
    if session is not None:
        passing[SESSION_HEADER] = session
    if api_key is not None:
        passing["Authorization"] = f"Bearer {api_key}"
    return passing


def for_client(
    headers: CIMultiDictProxy[str], backend: str, decision: str, session: str | None
) -> CIMultiDict[str]:
    """What the client is answered, with where its call went and whose it was taken for."""
    passing = _passing(headers)
    passing[BACKEND_HEADER] = backend
    passing[DECISION_HEADER] = decision
    if session is not None and session.isascii() and session.isprintable():
        passing[SESSION_HEADER] = session
    return passing


def for_websocket(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """Without what a client of its own says in the handshake."""
    for name in [name for name in headers if name.lower().startswith("sec-websocket-")]:
        headers.popall(name, None)
    return headers
