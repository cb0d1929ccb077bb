"""What each workflow is, and what it waits for: plain values for those who ask."""

from __future__ import annotations

from collections.abc import Iterator, Set
from functools import cached_property
from typing import Any, Literal, get_args

from vllm_saga.policy.decisions import HELD
from vllm_saga.policy.fairness import OTHER
from vllm_saga.policy.identity import anonymous_id, is_anonymous, short_id
from vllm_saga.policy.report import public_key
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.timeline import Event, PastWorkflow
from vllm_saga.policy.workflow import SessionKey, Workflow

#: States of a workflow, in the order in which they are listed. queued: let in, and waits for vLLM
#: (its batch is full, or its pool); gap: between two calls; presumed_ended: away for too long.
State = Literal["held", "queued", "running", "gap", "presumed_ended"]
STATES: tuple[State, ...] = get_args(State)
#: Workflows that one answer describes at most.
MAX_LIMIT = 500
_MAX_SESSIONS = 16
_OTHERS = "(others)"


class Explainer:
    """Answers for one moment; it changes nothing. Make a new one for each question.

    Listing costs about 1 µs for each workflow there is, and 100 µs for each that is described.

    Args:
        running: ids of the calls that the engine is computing.
        tenant: whose workflows are told, by its own name or as reports call it; None = everybody's.

    Times in answers are seconds before or after `now`, sizes are KV blocks of `block_tokens`.
    """

    def __init__(
        self, policy: SagaPolicy, now: float, running: Set[str], tenant: str | None = None
    ) -> None:
        self._policy = policy
        self._now = now
        self._running = running
        self._tenant = tenant
        self._names: dict[str, str] = {}

    # -- answers --------------------------------------------------------------------------------

    def workflows(self, state: str | None, limit: int) -> dict[str, Any]:
        """Those in `state` (None: any), the held in the order of their turns, then the busy, then
        those in a gap, latest first; the pool; and the tenants.
        """
        by_state: dict[str, list[Workflow]] = {name: [] for name in STATES}
        for workflow in self._everybody():
            if self._is_told(workflow):
                by_state[self._state(workflow)].append(workflow)
        by_state["held"].sort(key=self._places.__getitem__)
        found = [w for name in STATES if state in (None, name) for w in by_state[name]]
        return {
            "total": len(found),
            "counts": {name: len(members) for name, members in by_state.items()},
            "workflows": [self._brief(workflow) for workflow in found[: min(limit, MAX_LIMIT)]],
            "pool": self.pool(),
            "tenants": self._tenants(),
        }

    def workflow(self, name: str) -> dict[str, Any] | None:
        """All that is known of the workflow that has a session of this name; None if none has.

        Of several tenants' the one that made a call last.
        """
        named = [w for w in self._named(name) if self._is_told(w)]
        if not named:
            return None
        workflow = max(named, key=lambda w: (bool(w.calls), w.idle_since))
        decisions = [
            {"ago_s": self._ago(d.at), "what": d.what, "why": d.why, "blocks": d.blocks}
            for d in workflow.decisions
        ]
        return self._brief(workflow) | {
            "predicted": self._predicted(workflow),
            "share": self._share(workflow.tenant),
            "decisions": decisions,
        }

    def pool(self) -> dict[str, int]:
        """Whose KV blocks are whose: a prefix that residents share counts as the busy ones'."""
        residency = self._policy.residency
        counted = len(residency.ledger)
        busy = [w for w in residency.residents if w.calls]
        running = min(sum(w.counted_blocks for w in busy), counted)
        return {
            "capacity_blocks": residency.capacity,
            "block_tokens": self._policy.block_size,
            "running_blocks": running,
            "gap_blocks": counted - running,
            "promised_blocks": residency.used_blocks - counted - residency.loose_blocks,
            "visitor_blocks": residency.loose_blocks,
            "free_blocks": residency.capacity - residency.used_blocks,
            "residents": len(residency.residents),
            "residents_in_gap": len(residency.residents) - len(busy),
        }

    def past(self, within_s: float, limit: int) -> dict[str, Any]:
        """Calls and workflows that have ended within the last `within_s` seconds, latest first.

        `number` is the same each time that an event is told. A workflow's `id` is that of the
        session it began with; `let_in_ago_s` is None for a call that was withdrawn while held.
        """
        events: list[dict[str, Any]] = []
        for number, event in self._policy.timeline.latest():
            recent = self._now - event.ended_at <= within_s
            if len(events) == limit or not (recent or isinstance(event, PastWorkflow)):
                break
            if recent and self._is_tenant_told(event.root[0]):
                events.append({"number": number} | self._event(event))
        return {"events": events}

    # -- which ----------------------------------------------------------------------------------

    def _everybody(self) -> Iterator[Workflow]:
        """Every workflow but plain calls that are over."""
        policy = self._policy
        yield from dict.fromkeys(call.context.session.workflow for call in policy.calls.values())
        yield from (workflow for workflow in reversed(policy.table.idle) if workflow.known)

    def _named(self, name: str) -> list[Workflow]:
        wanted = {short_id(name), anonymous_id(name)}
        found = [s.workflow for k, s in self._policy.table.sessions.items() if k[1] in wanted]
        return [workflow for workflow in found if workflow.known or workflow.calls]

    def _is_told(self, workflow: Workflow) -> bool:
        return self._is_tenant_told(workflow.tenant)

    def _is_tenant_told(self, tenant: str) -> bool:
        return self._tenant is None or self._tenant in (tenant, self._public(tenant))

    def _public(self, tenant: str) -> str:
        name = self._names.get(tenant)
        if name is None:
            name = self._names[tenant] = public_key(self._policy, (tenant, ""))[0]
        return name

    def _state(self, workflow: Workflow) -> str:
        if workflow.held:
            return "held"
        if workflow.calls:
            return "queued" if self._running.isdisjoint(workflow.calls) else "running"
        return "presumed_ended" if workflow.stale else "gap"

    @cached_property
    def _line(self) -> list[Workflow]:
        return self._policy.share.line(self._now)

    @cached_property
    def _places(self) -> dict[Workflow, int]:
        return {workflow: place for place, workflow in enumerate(self._line)}

    @cached_property
    def _first_shortfall(self) -> int:
        return self._policy.residency.shortfall(self._line[0])

    @cached_property
    def _agents(self) -> dict[int, str]:
        return {id(agent): key for key, agent in self._policy.classes.items()}

    # -- what -----------------------------------------------------------------------------------

    def _brief(self, workflow: Workflow) -> dict[str, Any]:
        sessions = [_name(key) for key in workflow.sessions]
        held = len(workflow.held)
        running = sum(call_id in self._running for call_id in workflow.calls)
        return {
            "id": sessions[0] if sessions else None,
            "tenant": self._public(workflow.tenant),
            "sessions": sessions[:_MAX_SESSIONS],
            "more_sessions": max(len(sessions) - _MAX_SESSIONS, 0),
            "agent": self._agents.get(id(workflow.agent)),
            "plain": not workflow.known,
            "state": self._state(workflow),
            "age_s": self._ago(workflow.began_at),
            "idle_s": None if workflow.calls else self._ago(workflow.idle_since),
            "calls_done": workflow.calls_done,
            "calls": {
                "running": running,
                "queued": len(workflow.calls) - held - running,
                "held": held,
            },
            "tool": workflow.tool,
            "resident": workflow.resident,
            "blocks": workflow.counted_blocks
            + sum(c.loose_blocks for c in workflow.calls.values()),
            "lost_tokens": workflow.lost_tokens,
            "waits_for": self._waits_for(workflow) if workflow.held else None,
        }

    def _waits_for(self, workflow: Workflow) -> dict[str, Any]:
        """Why a held workflow is not let in now: what it is short of, and who is before it.

        what: "room" = it is the next one, and enters once `short_blocks` are free; "line" = those
        before it come first, and then it has to fit, too; "step" = it enters with the next step.
        """
        residency, place = self._policy.residency, self._places[workflow]
        needed = residency.needed_blocks(workflow)
        free = residency.capacity - residency.used_blocks
        fits = residency.fits(workflow)
        first = self._line[0]
        numbers = {
            "what": "line" if place else "step" if fits else "room",
            "ahead": place,
            "first": _id(first) if place and self._is_told(first) else None,
            "first_short_blocks": max(self._first_shortfall, 0),
            "needed_blocks": needed,
            "growth_blocks": residency.growth_blocks(workflow, needed),
            "overdraft_blocks": residency.overdraft_blocks(workflow),
            "free_blocks": free,
            "short_blocks": 0 if fits else residency.shortfall(workflow),
            "held_s": self._ago(workflow.held_since),
            "rule": next((d.why for d in reversed(workflow.decisions) if d.what == HELD), None),
            "runs_within_s": round(max(workflow.held_until - self._now, 0.0), 3),
        }
        return {"text": _in_words(numbers, residency.capacity), **numbers}

    def _event(self, event: Event) -> dict[str, Any]:
        told = {"id": _name(event.root), "tenant": self._public(event.root[0])}
        if isinstance(event, PastWorkflow):
            return told | {
                "what": "workflow",
                "began_ago_s": self._ago(event.began_at),
                "ended_ago_s": self._ago(event.ended_at),
                "calls": event.calls,
                "lost_tokens": event.lost_tokens,
            }
        let_in = None if event.begun_at is None else self._ago(event.begun_at)
        return told | {
            "what": "call",
            "session": _name(event.session),
            "arrived_ago_s": self._ago(event.arrived_at),
            "let_in_ago_s": let_in,
            "ended_ago_s": self._ago(event.ended_at),
            "prompt_tokens": event.prompt_tokens,
            "cached_tokens": event.cached_tokens,
            "output_tokens": event.total_tokens - event.prompt_tokens,
            "tool": event.tool,
        }

    def _predicted(self, workflow: Workflow) -> dict[str, Any] | None:
        """What its class expects of it; seconds of gaps are counted from their beginning."""
        if not workflow.known:
            return None
        agent = workflow.agent
        gaps = agent.gaps_after(workflow.tool)
        in_gap = self._state(workflow) == "gap"
        idle_s = self._now - workflow.idle_since
        return {
            "gap_s": {"p50": _digits(gaps.quantile_s(0.5)), "p90": _digits(gaps.quantile_s(0.9))},
            "p_return": _digits(gaps.p_return(idle_s)) if in_gap else None,
            "calls_left": _digits(workflow.remaining_calls()),
            "growth_tokens": round(workflow.remaining_growth_tokens()),
            "seconds_left": _digits(workflow.remaining_s()),
            "evidence": _digits(agent.sure),
            "confidence": _digits(agent.confidence(workflow.tool)),
        }

    def _share(self, tenant: str) -> dict[str, Any]:
        """Where a tenant stands (Agent Fair Share); `behind`: others go first, it has had more."""
        share = self._policy.share
        lead_s = share.place(tenant, self._now).lead_s
        used = share.state().get(tenant, {})
        return {
            **{name: _digits(value) for name, value in used.items()},
            "tenant": self._public(tenant), "lead_s": _digits(lead_s), "behind": lead_s > 0.0,
        }  # fmt: skip

    def _tenants(self) -> dict[str, dict[str, float]]:
        told = {}
        for tenant, used in self._policy.share.state().items():
            name = _OTHERS if tenant == OTHER else self._public(tenant)
            if self._tenant is None or self._tenant in (tenant, name):
                told[name] = {field: _digits(value) for field, value in used.items()}
        return told

    def _ago(self, at: float) -> float:
        return round(self._now - at, 3)


def _id(workflow: Workflow) -> str | None:
    return next((_name(key) for key in workflow.sessions), None)


def _name(key: SessionKey) -> str:
    """What a session is called; one that no client named, by its first call."""
    return key[1].removeprefix(anonymous_id("")) if is_anonymous(key) else key[1]


def _digits(value: float) -> float:
    return round(value, 3)


def _in_words(numbers: dict[str, Any], capacity: int) -> str:
    needed, growth = numbers["needed_blocks"], numbers["growth_blocks"]
    wants = f"it needs {needed} blocks" + (f" and {growth} for growth" if growth > 0 else "")
    short, free = numbers["short_blocks"], max(numbers["free_blocks"], 0)
    lent = numbers["overdraft_blocks"]
    may = f" ({lent} may be lacking)" if lent else ""
    has = f"{free} of {capacity} are free{may}, {short} short"
    room = f"{wants}; {has}" if short else f"{wants}: fits"
    end = f"; runs in any case within {numbers['runs_within_s']:.0f} s"
    if numbers["what"] == "step":
        return "it enters with the next step"
    if numbers["what"] == "room":
        return f"room: {room}" + end
    ahead = numbers["ahead"]
    who = "1 workflow is" if ahead == 1 else f"{ahead} workflows are"
    return f"its turn: {who} ahead, the first {numbers['first_short_blocks']} short; {room}" + end
