"""Checks of a running router: whether it is one, and how its backends are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_saga.client import Client
from vllm_saga.doctor.findings import Finding, ok, problem, warning

_ADD = "Add some: --backends, --backends-file, or POST /v1/saga/backends."


async def check_router(client: Client) -> list[Finding] | None:
    """None if what is there is no router. Raises UnreachableError if nobody answers."""
    reply = await client.get("/v1/saga/backends")
    values = reply.values()
    if reply.status in (401, 403) and values.get("type") == "error":
        return [
            problem("router", f"{client.url}: {reply.error}", "Pass the operator's key: --api-key.")
        ]
    backends = values.get("backends")
    if reply.status != 200 or not isinstance(backends, list):
        return None
    if not backends:
        return [problem("router", "it has no backends", _ADD)]
    up = sum(backend.get("state") == "up" for backend in backends)
    found = [ok("router", f"{up} of {len(backends)} backends are up")]
    for backend in backends:
        found += _check_backend(backend)
    return found


def _check_backend(backend: Mapping[str, Any]) -> Iterator[Finding]:
    check = f"backend {backend.get('id')}"
    state = backend.get("state")
    if state != "up":
        yield problem(
            check,
            str(state),
            "Look into its log; calls go to the others meanwhile. "
            f"`vllm-saga doctor --url {backend.get('url')}` says more once it answers.",
        )
    elif backend.get("draining"):
        yield warning(
            check, "draining: it gets no new session", f"POST {_path(backend)}/undrain ends that."
        )
    elif not backend.get("speaks_saga"):
        yield warning(
            check,
            "it tells nothing of its sessions",
            "Start it with VLLM_PLUGINS=saga and --scheduler-cls saga: placement then knows who is "
            "resident and who is held there.",
        )
    else:
        report = backend.get("report") or {}
        yield ok(check, f"{report.get('resident', 0)} resident, {report.get('held', 0)} held")


def _path(backend: Mapping[str, Any]) -> str:
    return f"/v1/saga/backends/{backend.get('id')}"
