"""What has ended lately, calls and workflows: for those who draw it or trace it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from vllm_saga.policy.workflow import Call, SessionKey, Workflow

#: So many events are kept of one engine, the last ones.
MAX_EVENTS = 4096


class PastCall(NamedTuple):
    """A call of a known workflow, from its arrival to its end (the policy's clock, seconds).

    `workflow_began_at` is the arrival of its workflow's first call, `begun_at` when it was let in,
    None if it was withdrawn while it was held. `cached_tokens` of its prompt were in the prefix
    cache; `tool` is the node that it led to.
    """

    workflow: int
    root: SessionKey
    workflow_began_at: float
    session: SessionKey
    call_id: str
    arrived_at: float
    begun_at: float | None
    ended_at: float
    prompt_tokens: int
    cached_tokens: int
    total_tokens: int
    tool: str | None


class PastWorkflow(NamedTuple):
    """A workflow that has ended or was forgotten; `ended_at` is the end of its last call.

    `open`: it has done neither, but its engine ends.
    """

    workflow: int
    root: SessionKey
    began_at: float
    ended_at: float
    calls: int
    lost_tokens: int
    open: bool = False


Event = PastCall | PastWorkflow


def past_workflow(workflow: Workflow, ended_at: float, open: bool = False) -> PastWorkflow:
    """What is kept of a workflow."""
    return PastWorkflow(
        workflow.seq,
        workflow.root,
        workflow.began_at,
        ended_at,
        workflow.calls_done,
        workflow.lost_tokens,
        open,
    )


class Timeline:
    """The last `MAX_EVENTS` events, numbered from 0 in the order in which they became known."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.count = 0

    def add_call(self, call: Call, total_tokens: int, held: bool, now: float) -> None:
        """A call has ended; `held`: before it was let in."""
        context = call.context
        workflow = context.session.workflow
        self._add(
            PastCall(
                workflow.seq,
                workflow.root,
                workflow.began_at,
                context.session.key,
                call.call_id,
                call.arrived_at,
                None if held else call.begun_at,
                now,
                call.prompt_tokens,
                call.cached_tokens,
                total_tokens,
                context.tool,
            )
        )

    def add_workflow(self, workflow: Workflow) -> None:
        """A workflow has ended, or is forgotten."""
        self._add(past_workflow(workflow, workflow.idle_since))

    def latest(self) -> Iterator[tuple[int, Event]]:
        """Events with their numbers, the last one first."""
        for back, event in enumerate(reversed(self._events), start=1):
            yield self.count - back, event

    def since(self, count: int) -> list[Event]:
        """What has come since there were `count` events, in order, but for what is forgotten."""
        new = min(self.count - count, len(self._events))
        return [self._events[i] for i in range(len(self._events) - new, len(self._events))]

    def _add(self, event: Event) -> None:
        self._events.append(event)
        self.count += 1
