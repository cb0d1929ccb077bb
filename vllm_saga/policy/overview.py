"""The workflows of several engines as one answer."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any

from vllm_saga.policy.explain import STATES

Overview = dict[str, Any]
"""{"total", "workflows": [each with "engine"], "engines": [each with "engine"], "tenants"}"""

Past = dict[str, Any]
"""{"events": [each with "engine", latest first], "engines": [each with "engine"]}"""

_NOBODY: dict[str, Any] = {"total": 0, "workflows": [], "counts": {}, "tenants": {}}


def of_engine(name: str, answer: dict[str, Any]) -> Overview:
    """What an engine has answered (`Explainer.workflows`, and how many calls run and wait)."""
    told = _NOBODY | answer
    about = {k: v for k, v in told.items() if k not in ("total", "workflows", "tenants")}
    return {
        "total": told["total"],
        "workflows": [{"engine": name, **workflow} for workflow in told["workflows"]],
        "engines": [{"engine": name, **about}],
        "tenants": told["tenants"],
    }


def silent(name: str, why: str) -> Overview:
    """The part of an engine that cannot be asked."""
    return _NOBODY | {"engines": [{"engine": name, "error": why}]}


def renamed(told: Overview | Past, server: str) -> Overview | Past:
    """What a server tells, its engines called as others know them: SERVER, or SERVER-dpRANK."""
    single = len(told["engines"]) == 1

    def name(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"engine": server if single else f"{server}-dp{part['engine']}"}

    lists = told.keys() & {"workflows", "events", "engines"}
    return told | {field: [name(part) for part in told[field]] for field in lists}


def together(parts: Iterable[Overview], limit: int) -> Overview:
    """All of them: workflows by state, `limit` at most; what tenants have had is added up."""
    whole: Overview = {"total": 0, "workflows": [], "engines": [], "tenants": {}}
    for part in parts:
        whole["total"] += part["total"]
        whole["workflows"] += part["workflows"]
        whole["engines"] += part["engines"]
        for tenant, used in part["tenants"].items():
            whole["tenants"][tenant] = _added(whole["tenants"].get(tenant), used)
    whole["workflows"].sort(key=lambda workflow: STATES.index(workflow["state"]))
    del whole["workflows"][limit:]
    return whole


def _added(so_far: dict[str, float] | None, used: dict[str, float]) -> dict[str, float]:
    if so_far is None:
        return dict(used)
    fields = so_far.keys() | used.keys()
    total = {name: so_far.get(name, 0.0) + used.get(name, 0.0) for name in sorted(fields)}
    return total | {"weight": used.get("weight", 1.0)}


def past_of_engine(name: str, answer: dict[str, Any]) -> Past:
    """What has ended on an engine (`Explainer.past`)."""
    events = [{"engine": name, **event} for event in answer["events"]]
    return {"events": events, "engines": [{"engine": name}]}


def past_together(parts: Iterable[Past], limit: int) -> Past:
    """All of them, `limit` events at most, latest first. `number` is one engine's own."""
    whole: Past = {"events": [], "engines": []}
    for part in parts:
        whole["events"] += part.get("events", ())
        whole["engines"] += part["engines"]
    whole["events"].sort(key=itemgetter("ended_ago_s"))
    del whole["events"][limit:]
    return whole


def latest(found: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Of a workflow that several engines know (it has moved): where it is now."""
    return min(found, key=lambda workflow: workflow["idle_s"] or 0.0, default=None)
