"""The sessions a router remembers: where each is at home, how large, and whether it still lives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_saga.policy.agenda import Agenda
from vllm_saga.policy.gaps import DOUBT, judged_again_at
from vllm_saga.policy.graph import AgentClass
from vllm_saga.router.fleet import Arrival, SessionKey
from vllm_saga.router.load import Load

# Of the growth that is expected, what a session needs on average until its end.
_GROWTH_SHARE = 0.5
# A shorter context may be a side call of its own: the larger one is forgotten by so much a call.
_FORGET = 0.7
# A session is presumed to have ended when its chance to return falls below this.
_GIVE_UP = 0.1


def expected_need(agent: AgentClass, tokens: float, calls_left: float) -> float:
    """Tokens of KV that a session whose context holds `tokens` needs on average until its end."""
    growth = max(calls_left * agent.growth_tokens, 0.0)
    return tokens + agent.output_tokens + _GROWTH_SHARE * growth


@dataclass(eq=False, slots=True)
class Session:
    """A session in the router.

    home: where its calls go; None before its first, or once that engine has left or lost its KV.
    run: which run of the home engine it was placed in. begun: whether that engine has computed
    anything of it. calls: in flight, with their arrivals. tokens: of its context. sticky_until: it
    is not moved before. moved: how often its call has been moved. answered_tokens: of the context
    after its last answered call. calls_counted: of calls_done, those its class has learned.
    calls_left: expected then. doubted: its class counts it as ended, until it returns; stale:
    presumed to have ended; ending: said to end with its calls.
    counted: whether its home counts it now; need, leaves_per_s: for how much (tokens of KV; of
    these how many become free in a second, on average).
    """

    key: SessionKey
    agent: AgentClass
    prefix: int | None
    home: Load | None = None
    run: int = 0
    begun: bool = False
    calls: dict[str, Arrival] = field(default_factory=dict)
    calls_done: int = 0
    calls_counted: int = 0
    calls_left: float = 0.0
    tokens: float = 0.0
    answered_tokens: int = 0
    used_at: float = 0.0
    sticky_until: float = 0.0
    moved: int = 0
    doubted: bool = False
    stale: bool = False
    ending: bool = False
    counted: bool = False
    need: float = 0.0
    leaves_per_s: float = 0.0

    @property
    def new(self) -> bool:
        """Whether no call of it has been answered."""
        return not self.calls_done and not self.begun

    def answered(self, arrival: Arrival, total_tokens: int, now: float) -> None:
        """A call of it has been answered, and left a context of `total_tokens`."""
        agent = self.agent
        if self.calls_done:
            agent.observe_cycle(now - self.used_at)
            agent.observe_call(None, None, total_tokens - self.answered_tokens)
        agent.observe_output(max(total_tokens - arrival.prompt_tokens, 0))
        self.calls_done += 1
        self.calls_left = agent.remaining_calls(self.calls_done)
        self.answered_tokens = total_tokens
        self.tokens = max(total_tokens, _FORGET * self.tokens)

    def count_calls(self) -> None:
        """Its class learns how far it has come, now that it is known whether it went on."""
        self.agent.observe_progress(self.calls_done, self.calls_counted)
        self.calls_counted = self.calls_done

    def count_end(self) -> None:
        """Its class learns that it has ended; once, unless it returns."""
        if self.calls_done and not self.doubted:
            self.doubted = True
            self.count_calls()
            self.agent.observe_end(self.calls_done)

    def count_return(self, gap_s: float) -> None:
        """Its class learns that it was away for so long and has gone on."""
        self.count_calls()
        if self.doubted:
            self.agent.retract_end(self.calls_done)
        self.agent.gaps.observe_return(gap_s)

    def recount(self) -> None:
        """Have its home count what it needs now."""
        self.uncount()
        if self.home is not None and not self.lost and not self.stale:
            to_come = 0.0 if self.doubted else self.calls_left
            self.need = expected_need(self.agent, self.tokens, to_come)
            self.leaves_per_s = self.need / max(self.calls_left * self.agent.cycle_s, 1.0)
            self.home.count(1, self.need, self.leaves_per_s)
            self.counted = True

    def uncount(self) -> None:
        if self.counted and self.home is not None and not self.lost:
            self.home.count(-1, -self.need, -self.leaves_per_s)
        self.need = self.leaves_per_s = 0.0
        self.counted = False

    def settle(self, home: Load) -> None:
        """Change its home; nothing of it has been computed there."""
        self.uncount()
        self.home, self.run, self.begun = home, home.run, False
        self.recount()

    @property
    def lost(self) -> bool:
        """Whether it has no home, or one that has left or was restarted since."""
        return self.home is None or self.run != self.home.run


class SessionTable:
    """Sessions with calls in flight, and a bounded number of idle ones, the longest idle first out.

    Args:
        max_idle: idle sessions remembered at most.
        idle_s: seconds without a call after which a session is forgotten.
    """

    def __init__(self, max_idle: int, idle_s: float) -> None:
        self._max_idle = max_idle
        self._idle_s = idle_s
        self._sessions: dict[SessionKey, Session] = {}
        self._by_call: dict[str, Session] = {}
        self._idle: OrderedDict[SessionKey, Session] = OrderedDict()
        self._reviews: Agenda[tuple[Session, float]] = Agenda(self._is_away)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def get(self, key: SessionKey) -> Session | None:
        return self._sessions.get(key)

    def of_call(self, call_id: str) -> Session | None:
        """Whose call it is; None if it is not in flight or has no session."""
        return self._by_call.get(call_id)

    def add(self, session: Session) -> None:
        self._sessions[session.key] = session

    def begin(self, session: Session, arrival: Arrival, now: float) -> None:
        """It makes a call: its class learns how long it was away."""
        session.calls[arrival.call_id] = arrival
        self._by_call[arrival.call_id] = session
        if self._idle.pop(session.key, None) is not None and session.calls_done:
            session.count_return(now - session.used_at)
        session.doubted = session.stale = False

    def take(self, call_id: str) -> Arrival:
        """A call is not in flight any more; `rest` or `end` follows if it was the last."""
        return self._by_call.pop(call_id).calls.pop(call_id)

    def rest(self, session: Session, now: float) -> None:
        """It has no call in flight any more."""
        session.used_at = now
        self._idle[session.key] = session
        self._judge(session, now)

    def _judge(self, session: Session, now: float) -> None:
        """What its absence means by what is known now; and when it is judged again."""
        gaps, since = session.agent.gaps, session.used_at
        doubt, patience = gaps.patience_s(DOUBT), gaps.patience_s(_GIVE_UP)
        if now >= since + doubt:
            session.count_end()
            session.stale = now >= since + patience
            session.recount()
        if not session.stale:
            again = judged_again_at(since, now, doubt, patience)
            self._reviews.add(again, (session, since), len(self._idle))

    def end(self, session: Session) -> None:
        """It is over."""
        session.uncount()
        del self._sessions[session.key]
        self._idle.pop(session.key, None)
        session.count_end()

    def expire(self, now: float) -> None:
        """Time has passed: absences are judged anew whose time it is, the oldest forgotten."""
        while (due := self._reviews.take(now)) is not None:
            self._judge(due[1][0], now)
        while self._idle:
            oldest = next(iter(self._idle.values()))
            if len(self._idle) <= self._max_idle and now - oldest.used_at < self._idle_s:
                return
            self.end(oldest)

    def _is_away(self, absence: tuple[Session, float]) -> bool:
        session, since = absence
        here = self._idle.get(session.key) is session
        return here and session.used_at == since and not session.stale
