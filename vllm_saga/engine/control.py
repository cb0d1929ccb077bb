"""Messages into the engine: what it reports of itself, and sessions that end.

They come as vLLM's utility calls (`EngineCoreProc._handle_client_request`), which run on the
scheduler's own thread, between two steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set
from typing import Annotated, Any

import msgspec

from vllm_saga.policy.explain import MAX_LIMIT, Explainer, State
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.timeline import MAX_EVENTS

#: The method of `EngineCore`, or of its scheduler, that answers: (op, payload) -> plain values.
METHOD = "saga_control"
#: op: what the engine reports (`router.fleet.EngineReport`, and "saga"); no payload.
STATE = "state"
#: op: the session `{"tenant", "session"}` is over; answers `{"ended": whether it was there}`.
END = "end"
#: op: the workflows that `Listing` asks for; answers what `policy.overview.of_engine` reads.
WORKFLOWS = "workflows"
#: op: the workflow that `Named` asks for; answers `{"workflow": its values or None}`.
WORKFLOW = "workflow"
#: op: what has ended lately, as `Past` asks for; answers `Explainer.past`.
PAST = "past"


class Listing(msgspec.Struct):
    """Workflows of `tenant` (None: of all) that are in `state` (None: any), so many at most."""

    tenant: str | None = None
    state: State | None = None
    limit: Annotated[int, msgspec.Meta(ge=0, le=MAX_LIMIT)] = 100


class Named(msgspec.Struct):
    """The workflow of `tenant` (None: of any) that has a session called `name`."""

    name: str
    tenant: str | None = None


class Past(msgspec.Struct):
    """Calls and workflows of `tenant` (None: of all) that ended within the last `within_s`."""

    tenant: str | None = None
    within_s: Annotated[float, msgspec.Meta(ge=0.0)] = 60.0
    limit: Annotated[int, msgspec.Meta(ge=0, le=MAX_EVENTS)] = 1000


class ControlError(RuntimeError):
    """The engines cannot be asked, or do not run saga; the message says which."""


def install() -> None:
    """Give the `EngineCore` of this process the method; without an engine there is nothing to do.

    Nor is there where vLLM passes calls on to its scheduler (patches/). Here rather than in the
    plugin: an engine that was forked does not load plugins anew.
    """
    module = sys.modules.get("vllm.v1.engine.core")
    if module is None or hasattr(module.EngineCore, "scheduler_rpc"):
        return
    if not hasattr(module.EngineCore, METHOD):
        setattr(module.EngineCore, METHOD, _answer)


def _answer(self: Any, op: str, payload: Mapping[str, Any]) -> Any:
    return self.scheduler.saga_control(op, payload)


def read_end(op: str, payload: Mapping[str, Any]) -> tuple[str, str]:
    """Tenant and session of an `END` message.

    Raises:
        ValueError: it is another message, or lacks one of them.
    """
    names = payload.get("tenant"), payload.get("session")
    if op != END or not all(isinstance(name, str) for name in names):
        raise ValueError(f"saga: no such message: {op!r} with {sorted(payload)}")
    return names  # type: ignore[return-value]


def explain(
    saga: SagaPolicy | None,
    op: str,
    payload: Mapping[str, Any],
    now: float,
    running: Set[str],
    waiting: int,
) -> dict[str, Any]:
    """The answer to `WORKFLOWS`, `WORKFLOW` or `PAST`; `saga` is None where stock schedules.

    running: ids of the calls that the engine computes; waiting: how many it does not, held or not.

    Raises:
        ValueError: the payload asks for something else.
    """
    if op == WORKFLOW:
        named = msgspec.convert(dict(payload), Named)
        told = saga and Explainer(saga, now, running, named.tenant).workflow(named.name)
        return {"workflow": told or None}
    if op == PAST:
        past = msgspec.convert(dict(payload), Past)
        told = saga and Explainer(saga, now, running, past.tenant).past(past.within_s, past.limit)
        return told or {"events": []}
    asked = msgspec.convert(dict(payload), Listing)
    calls = {"scheduler": "saga" if saga else "stock", "running": len(running), "waiting": waiting}
    if saga is None:
        return calls
    return calls | Explainer(saga, now, running, asked.tenant).workflows(asked.state, asked.limit)


async def ask(engine_client: Any, op: str, payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ask every engine behind vLLM's `EngineClient`: one answer for each data-parallel rank.

    Raises:
        ControlError: the engines cannot be asked, or do not run saga.
    """
    rpc = getattr(engine_client, "scheduler_rpc", None)
    core = getattr(engine_client, "engine_core", None)
    # vLLM < 0.32 asks all ranks, too, but returns the first one's answer only.
    every = getattr(core, "call_utility_all_async", None)
    one = getattr(core, "call_utility_async", None)
    try:
        if rpc is not None:
            return list(await rpc(METHOD, (op, payload)))
        if every is not None:
            return list(await every(METHOD, op, payload))
        if one is not None:
            return [await one(METHOD, op, payload)]
    except Exception as error:
        if f"attribute '{METHOD}'" not in str(error):
            raise
        raise ControlError("this engine runs without --scheduler-cls saga") from error
    raise ControlError("this vLLM has no way to ask its engine")
