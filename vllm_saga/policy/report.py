"""What a router may know of an engine, and the end of a session that a client declares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from vllm_saga.policy.identity import is_anonymous, salt_tenant, session_key
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.workflow import Session, SessionKey

MAX_HELD_CALLS = 256
MAX_SESSIONS = 1000
# The prefill speed is that of a context of so many tokens.
_USUAL_CONTEXT_TOKENS = 4096


def report(policy: SagaPolicy, now: float) -> dict[str, Any]:
    """The policy's part of an engine's report, of plain values: see `router.fleet.EngineReport`.

    Held calls are the most recent ones, oldest first; sessions the most recent ones that have
    computed something, latest first. Sessions that no client named are left out.
    """
    block_size, residency = policy.block_size, policy.residency
    return {
        "kv_tokens": residency.capacity * block_size,
        "used_tokens": residency.used_blocks * block_size,
        "resident": len(residency.residents),
        "prefill_tokens_per_s": _prefill_speed(policy),
        "held_calls": _held_calls(policy, now),
        "sessions": _sessions(policy),
        "saga": policy.state(),
    }


def stock_report(kv_tokens: int, used_tokens: int) -> dict[str, Any]:
    """The same of an engine that schedules as stock does."""
    return {
        "kv_tokens": kv_tokens,
        "used_tokens": used_tokens,
        "resident": 0,
        "prefill_tokens_per_s": 0.0,
        "held_calls": [],
        "sessions": [],
        "saga": {},
    }


def together(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The reports of several ranks as of one engine."""
    if len(reports) == 1:
        return reports[0]
    whole: dict[str, Any] = {
        name: sum(report[name] for report in reports)
        for name in ("kv_tokens", "used_tokens", "running", "waiting", "resident")
    }
    for name in ("held_calls", "sessions"):
        whole[name] = [entry for report in reports for entry in report[name]]
    return whole | {
        "started": "-".join(report["started"] for report in reports),
        "prefill_tokens_per_s": fmean(report["prefill_tokens_per_s"] for report in reports),
        "saga": {},
        "ranks": reports,
    }


def end_session(policy: SagaPolicy, tenant: str, session_id: str, now: float) -> bool:
    """A client says that a session is over: it ends now, or with its calls in flight.

    tenant: by its own name, or as a report calls it. Returns whether there was such a session.
    """
    wanted = session_key(tenant, session_id)
    sessions = policy.table.sessions
    session = sessions.get(wanted)
    if session is None and tenant:
        alike = (s for key, s in sessions.items() if key[1] == wanted[1])
        session = next((s for s in alike if public_key(policy, s.key) == wanted), None)
    if session is None:
        return False
    policy.end_session(session, now)
    return True


def _prefill_speed(policy: SagaPolicy) -> float:
    seconds = policy.cost.prefill_s(_USUAL_CONTEXT_TOKENS) if policy.cost.known else 0.0
    return _USUAL_CONTEXT_TOKENS / seconds if seconds > 0.0 else 0.0


def _held_calls(policy: SagaPolicy, now: float) -> list[dict[str, Any]]:
    held: list[dict[str, Any]] = []
    for call in reversed(policy.calls.values()):
        if len(held) == MAX_HELD_CALLS or not policy.residency.held_calls:
            break
        session = call.context.session
        if call.call_id in session.workflow.held and not is_anonymous(session.key):
            tenant, name = public_key(policy, session.key)
            held.append(
                {
                    "tenant": tenant,
                    "session": name,
                    "new": _is_new(session),
                    "held_s": now - session.workflow.held_since,
                    "tokens": call.prompt_tokens,
                }
            )
    return held[::-1]


def _is_new(session: Session) -> bool:
    """Whether it has computed nothing, nor is about to."""
    held = session.workflow.held
    for context in session.contexts:
        if context.tokens or (context.call and context.call.call_id not in held):
            return False
    return True


def _sessions(policy: SagaPolicy) -> list[SessionKey]:
    in_flight = {call.context.session.workflow: None for call in reversed(policy.calls.values())}
    found: list[SessionKey] = []
    for workflow in chain(in_flight, reversed(policy.table.idle)):
        if not workflow.calls_done and len(workflow.held) == len(workflow.calls):
            continue
        for key, session in workflow.sessions.items():
            if session.contexts and not is_anonymous(key) and not _is_new(session):
                found.append(public_key(policy, key))
                if len(found) == MAX_SESSIONS:
                    return found
    return found


def public_key(policy: SagaPolicy, key: SessionKey) -> SessionKey:
    """A session's key without secrets: a tenant known by its cache salt goes by its digest."""
    tenant, name = key
    if tenant and policy.config.tenant_source == "cache_salt":
        tenant = salt_tenant(tenant)
    return (tenant, name)
