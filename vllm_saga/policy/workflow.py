"""The records everything else speaks about: Workflow ⊃ Session ⊃ Context, and the Call."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from vllm_saga.policy.chain import Chain
from vllm_saga.policy.decisions import MAX_DECISIONS, Decision
from vllm_saga.policy.graph import AgentClass
from vllm_saga.policy.hints import Hint
from vllm_saga.policy.outlook import AHEAD_S, Growth
from vllm_saga.policy.toolgraph import START

SessionKey = tuple[str, str]
"""(tenant, session id): a session id means nothing outside its tenant."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One LLM call as it reaches the scheduler.

    `chain` may grow in place while the call decodes. `tokens` are the prompt's token ids, or None
    where there are none to compare (embeddings).
    """

    call_id: str
    chain: Chain
    prompt_tokens: int
    tokens: Sequence[int] | None = None
    session_id: str | None = None
    parent_id: str | None = None
    tenant: str = ""
    priority: int = 0
    last: bool = False
    hint: Hint | None = None


@dataclass(eq=False, slots=True)
class Context:
    """One growing prompt of a session, and the owner of its cached KV blocks.

    A session has several when sub-agents or side calls share its id. `counted` is how many leading
    hashes of `chain` the residency ledger holds for it, `common` how many its last two prompts have
    in common. Its session has made `skipped` calls elsewhere since its last, and is taken to have
    `left` it: nothing is promised to it until it is back. Until `protected_until` a retention
    strategy keeps it before others. `tool` is the node of the execution graph that its last call
    led to.
    """

    session: Session
    chain: Chain = ()
    counted: int = 0
    common: int = 0
    prompt_blocks: int = 0
    tokens: int = 0
    call: Call | None = None
    idle_since: float = 0.0
    dead: bool = False
    anchors: tuple[Hashable, ...] = ()
    prompt_tail: tuple[int, ...] = ()
    prompt_tokens: int = 0
    protected_until: float = 0.0
    tool: str | None = START
    skipped: int = 0
    left: bool = False


@dataclass(eq=False, slots=True)
class Session:
    """A stream of calls with one id (or one lineage; `continued` if that has shown)."""

    key: SessionKey
    workflow: Workflow
    contexts: list[Context] = field(default_factory=list)
    ending: bool = False
    continued: bool = False


@dataclass(eq=False, slots=True)
class Workflow:
    """A root session with its sub-agents: one age, one residency, one share.

    `root` is the key of the session it began with, which may have ended since. `known` is False for
    a call that named no session and continued none, or by chance: it is scheduled as stock vLLM
    would. `stale` means away for so long that it has most likely ended, `doubted` that its class
    counts it as ended for now; `gives_way_at` is when it gives way if it is still away. `turn` is
    its place in the line of the held, `tool` the node of the execution graph that its last call
    led to, which was `last_session`'s. Of `calls_done` calls its class has learned the first
    `calls_counted`. `hint` is what its last call declared that declared anything, made when
    `hinted_at_calls` calls were done; `first_declared` how many calls it first declared to make in
    all, and how many had been expected; `due_s` its deadline, on the policy's clock. `charged_at`:
    until when its tenant has paid for the KV it holds. `lost_tokens` of it had been evicted and
    were computed again; `decisions` are the last that were taken about it.
    """

    seq: int
    agent: AgentClass
    known: bool
    root: SessionKey = ("", "")
    sessions: dict[SessionKey, Session] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    calls_done: int = 0
    calls_counted: int = 0
    priority: int = 0
    resident: bool = False
    was_resident: bool = False
    stale: bool = False
    doubted: bool = False
    gives_way_at: float = math.inf
    idle_since: float = 0.0
    next_blocks: int = 0
    growth: Growth | None = None
    held: dict[str, None] = field(default_factory=dict)
    held_since: float = 0.0
    held_until: float = 0.0
    turn: float = 0.0
    tool: str | None = None
    last_session: Session | None = None
    hint: Hint | None = None
    hinted_at_calls: int = 0
    first_declared: tuple[float, float] | None = None
    began_at: float = 0.0
    tenant: str = ""
    charged_at: float = 0.0
    due_s: float | None = None
    lost_tokens: int = 0
    decisions: tuple[Decision, ...] = ()

    def note(self, now: float, what: str, why: str, blocks: int = 0) -> None:
        """Something was decided about it (policy/decisions.py)."""
        self.decisions = (*self.decisions[1 - MAX_DECISIONS :], Decision(now, what, why, blocks))

    def declare(self, hint: Hint, now: float) -> None:
        """Its call declares something."""
        self.hint, self.hinted_at_calls = hint, self.calls_done
        if hint.deadline_s is not None:
            self.due_s = now + hint.deadline_s
        if self.first_declared is None and self.declared_calls:
            expected = self.calls_done + self.agent.remaining_calls(self.calls_done)
            self.first_declared = (self.declared_calls, expected)

    def remaining_calls(self) -> float:
        """Calls it is expected to make, as it declared where its class is believed; at least 1."""
        if self._is_believed:
            return max(self.declared_calls - self.calls_done, 1.0)
        return self.agent.remaining_calls(self.calls_done)

    @property
    def declared_calls(self) -> float:
        """Calls it declared to make in all; 0 if it did not."""
        if self.hint is None or self.hint.steps_left is None:
            return 0.0
        return self.hinted_at_calls + 1.0 + self.hint.steps_left

    def remaining_s(self) -> float:
        """Seconds it is expected to need until its end, holds aside."""
        return self.remaining_calls() * self.agent.cycle_s

    def remaining_growth_tokens(self) -> float:
        """Tokens it is expected to add until its end."""
        if self._is_believed:
            return self.remaining_calls() * self.agent.growth_tokens
        return self.agent.remaining_growth_tokens(self.calls_done)

    def outlook(self, blocks: int, block_size: int) -> Growth:
        """By how many blocks it is expected to outgrow the `blocks` that it has for itself."""
        left = self.remaining_calls() if self._is_believed else None
        tokens = self.agent.outlook(self.calls_done, left, blocks * block_size, AHEAD_S)
        return [(mean / block_size, var / block_size**2) for mean, var in tokens]

    @property
    def _is_believed(self) -> bool:
        return self.declared_calls > 0.0 and self.agent.declared_calls.believed

    @property
    def counted_blocks(self) -> int:
        """What the residency ledger holds for its contexts, what they share counted for each."""
        return sum(context.counted for context in self.contexts())

    def contexts(self) -> Iterator[Context]:
        for session in self.sessions.values():
            yield from session.contexts

    def wanted(self) -> Iterator[Context]:
        """Its contexts but for those that it has left."""
        return (context for context in self.contexts() if not context.left)


@dataclass(eq=False, slots=True)
class Call:
    """A call between its arrival and its end.

    `tail` is the prompt's token ids behind its last full block; `loose_blocks` what a call of an
    unknown workflow takes from the pool while it runs; `reused_tokens` how many of its tokens an
    earlier call of its session has computed.
    """

    call_id: str
    context: Context
    prompt_tokens: int
    last: bool
    tail: tuple[int, ...]
    gap_s: float
    arrived_at: float
    begun_at: float = 0.0
    loose_blocks: int = 0
    cached_tokens: int = 0
    reused_tokens: int = 0


class WorkflowTable:
    """Every workflow that is alive: those with a call in flight, and a bounded number of idle ones.

    Idle workflows leave when they have been away for `idle_s` seconds, or, longest away first,
    when there are more than `max_idle` of them or they remember more than `max_hashes` hashes.
    """

    def __init__(self, idle_s: float, max_idle: int, max_hashes: int) -> None:
        self._idle_s = idle_s
        self._max_idle = max_idle
        self._max_hashes = max_hashes
        self.sessions: dict[SessionKey, Session] = {}
        self.idle: OrderedDict[Workflow, int] = OrderedDict()
        self._idle_hashes = 0
        self._seq = 0

    def create(self, key: SessionKey, agent: AgentClass, known: bool) -> Session:
        """A new root session in a workflow of its own."""
        self._seq += 1
        return self.join(key, Workflow(self._seq, agent, known, key, tenant=key[0]))

    def join(self, key: SessionKey, workflow: Workflow) -> Session:
        """A new session in an existing workflow (a sub-agent under its root)."""
        session = Session(key, workflow)
        workflow.sessions[key] = session
        self.sessions[key] = session
        return session

    def drop_session(self, session: Session) -> None:
        """Forget a session; its workflow stays if it has others."""
        self.sessions.pop(session.key, None)
        session.workflow.sessions.pop(session.key, None)

    def rest(self, workflow: Workflow, now: float) -> None:
        """`workflow` has no call in flight any more."""
        workflow.idle_since = now
        hashes = sum(len(context.chain) for context in workflow.contexts())
        self.idle[workflow] = hashes
        self._idle_hashes += hashes

    def wake(self, workflow: Workflow) -> bool:
        """`workflow` makes a call; returns whether it had been idle."""
        hashes = self.idle.pop(workflow, None)
        if hashes is None:
            return False
        self._idle_hashes -= hashes
        return True

    def expired(self, now: float) -> Iterator[Workflow]:
        """Take out the idle workflows whose time or room is up, longest away first."""
        while self.idle:
            workflow = next(iter(self.idle))
            if (
                now - workflow.idle_since < self._idle_s
                and len(self.idle) <= self._max_idle
                and self._idle_hashes <= self._max_hashes
            ):
                return
            self.wake(workflow)
            for session in list(workflow.sessions.values()):
                self.sessions.pop(session.key, None)
            yield workflow
