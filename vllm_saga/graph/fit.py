"""Agent classes learned from traces, as an engine would learn them from the calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllm_saga.policy.graph import AgentClass, AgentClasses
from vllm_saga.policy.toolgraph import JOINT, START, SUBAGENTS, node_name
from vllm_saga.simulator.trace import Session


class Step(NamedTuple):
    """A call as the graph learns it.

    before: the node it comes after: what its context waited for. None where that is not known.
    joined: the node before, if the context waited for the sub-agents that it led to.
    gap_s: seconds since the context's last call; None where not recorded, and for a first call.
    growth_tokens: by how much the call lengthened its context.
    tool: the node that its output leads to; None where that was not recorded.
    """

    before: str | None
    joined: str | None
    gap_s: float | None
    growth_tokens: int
    tool: str | None


def fit(sessions: Sequence[Session]) -> AgentClasses:
    """The classes of `sessions`, which come in their order of arrival."""
    classes = AgentClasses()
    for session in sorted(sessions, key=lambda session: session.arrival_s or 0.0):
        learn(class_of(classes, session), session)
    return classes


def class_of(classes: AgentClasses, session: Session) -> AgentClass:
    """A class is what shares a prefix group, else a tenant, else a source."""
    group = session.shared_prefix.group if session.shared_prefix else None
    return classes.get(("", group or session.tenant or session.source or "all"))


def learn(agent: AgentClass, session: Session) -> None:
    """Teach `agent` the calls, gaps and end of a session."""
    last = None
    for number, (step, call) in enumerate(zip(steps(session), session.calls, strict=True), 1):
        agent.observe_progress(number)
        if step.joined is not None:
            agent.observe_join(step.joined)
        if step.gap_s is not None:
            agent.gaps_after(step.before).observe_return(step.gap_s)
        agent.observe_call(step.before, step.tool, step.growth_tokens)
        agent.observe_cycle((step.gap_s or 0.0) + call.model_s)
        if call.agent is None:
            last = step.tool
    agent.observe_end_after(last, len(session.calls))


def steps(session: Session) -> Iterator[Step]:
    """The calls of a session, in order of their start.

    A call without a tool is an answer, unless the session names no tool at all: then no names were
    recorded.
    """
    calls = session.calls
    named = any(call.tool for call in calls)
    nodes = [node_name((call.tool or "").split(JOINT)) if named else None for call in calls]
    for index, call in enumerate(calls):
        parent = session.parents[index]
        if parent is None or calls[parent].agent != call.agent:
            yield Step(START, None, None, call.output_tokens, nodes[index])
            continue
        growth = max(call.context_tokens - calls[parent].context_tokens, 0)
        before, tool = nodes[parent], nodes[index]
        if any(calls[dep].agent != call.agent for dep in session.deps[index]):
            gap_s = session.timeline[index][0] - session.timeline[parent][1]
            yield Step(SUBAGENTS, before, gap_s, growth, tool)
            continue
        known = call.delay_s is not None or calls[parent].tool_latency_s is not None
        yield Step(before, None, session.delays_s[index] if known else None, growth, tool)
