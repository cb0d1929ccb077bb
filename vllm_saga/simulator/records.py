"""What the simulator speaks about while it runs: live sessions, their threads, and their calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_saga.simulator import trace


@dataclass(eq=False, slots=True)
class LiveSession:
    """One copy of a trace session in one run. Times are seconds of the virtual clock.

    `id` is unique to the copy, and so is its content; `number` counts arrivals from 0.
    """

    id: str
    trace: trace.Session
    number: int
    arrival_s: float
    lane: int | None = None
    calls: list[LiveCall | None] = field(default_factory=list)
    threads: dict[str | None, Thread] = field(default_factory=dict)
    calls_done: int = 0
    finished_s: float | None = None

    @property
    def tenant(self) -> str:
        return self.trace.tenant or ""


@dataclass(eq=False, slots=True)
class Thread:
    """The calls of one agent of a session (None: its main agent), one growing context.

    `call` is the call in flight (issued and not finished), `last` the one that finished last.
    `ended` is True once the trace holds no further call of this thread.
    """

    session: LiveSession
    agent: str | None
    call: LiveCall | None = None
    last: LiveCall | None = None
    ended: bool = False

    @property
    def idle_since(self) -> float:
        """When its last call finished; the session's arrival before the first."""
        if self.last is None or self.last.finished_s is None:
            return self.session.arrival_s
        return self.last.finished_s

    @property
    def context_tokens(self) -> int:
        """Tokens of KV its last call left behind."""
        return self.last.spec.context_tokens if self.last else 0


@dataclass(eq=False, slots=True)
class LiveCall:
    """One LLM call of one run.

    issued_s: the agent sends it; submitted_s: it reaches an engine (later if held at a gate);
    first_token_s, finished_s: as the client sees them. `cached_tokens` are prompt tokens found in
    the prefix cache when it was first scheduled.
    """

    id: str
    thread: Thread
    index: int
    issued_s: float
    replica: int = -1
    submitted_s: float = -1.0
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = -1

    @property
    def session(self) -> LiveSession:
        return self.thread.session

    @property
    def spec(self) -> trace.Call:
        """The call as the trace describes it."""
        return self.session.trace.calls[self.index]

    @property
    def wait_s(self) -> float:
        """From issue to first token; -1 if there was none."""
        return -1.0 if self.first_token_s is None else self.first_token_s - self.issued_s
