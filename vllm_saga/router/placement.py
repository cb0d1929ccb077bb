"""Where a call goes: to its KV; a new workflow to where it fits, warm prefixes preferred."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from vllm_saga.policy.graph import AgentClasses
from vllm_saga.router.fleet import Arrival, Decision, EngineReport, Move, Placer, SessionKey
from vllm_saga.router.load import Load
from vllm_saga.router.replicas import BasePlacer, Replica, fewest_calls, open_to_new, rendezvous
from vllm_saga.router.sessions import Session, SessionTable, expected_need
from vllm_saga.router.simple import BySession, LeastLoaded, RoundRobin
from vllm_saga.router.stealing import Stealing, Thresholds


@dataclass(frozen=True, slots=True)
class Settings:
    """What may be tuned of `SagaPlacer`.

    tie_share: replicas whose loads differ by less are alike, and rendezvous hashing decides.
    warm_share: so much more load a replica may have if the prefix of a new session is warm there.
    Both in shares of the mean load.
    overload_share: share of its KV pool above which a replica is full: sub-agents do not join their
    root there, and new sessions come only if all are.
    max_idle_sessions, session_idle_s: when sessions are forgotten.
    stealing: None = sessions are never moved.
    """

    tie_share: float = 0.01
    warm_share: float = 0.05
    overload_share: float = 1.0
    max_idle_sessions: int = 100_000
    session_idle_s: float = 1_800.0
    stealing: Thresholds | None = field(default_factory=Thresholds)


class SagaPlacer(BasePlacer):
    """Sessions stay where their KV is; new ones go where their predicted working set fits best.

    What a session will need is learned by kind of agent (tenant and shared prefix), with the same
    `AgentClass` that the engines use. Replicas are compared by the tokens they are committed to
    over their KV pool and by their sessions (`Load`), as the router counts them and as the engines
    report. A session that this router does not know, because it has been restarted or another one
    placed it, is found in the engines' reports; failing that, rendezvous hashing decides among
    replicas that are alike, so that routers agree without talking. Calls without a session go where
    the fewest calls are.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()
        self.sessions = SessionTable(self.settings.max_idle_sessions, self.settings.session_idle_s)
        self.loads: dict[str, Load] = {}
        self._classes = AgentClasses()
        thresholds = self.settings.stealing
        self._stealing = Stealing(thresholds) if thresholds is not None else None

    # -- events ---------------------------------------------------------------------------------

    def add(self, replica: str) -> None:
        super().add(replica)
        self.loads.setdefault(replica, Load(self.replicas[replica]))

    def remove(self, replica: str) -> None:
        super().remove(replica)
        load = self.loads.pop(replica, None)
        if load is not None:
            load.forget()

    def on_report(self, replica: str, report: EngineReport) -> None:
        if replica in self.loads:
            self.loads[replica].on_report(report)

    def place(self, arrival: Arrival, now: float, exclude: Collection[str] = ()) -> Decision | None:
        before = self._take(arrival.call_id)
        decision = super().place(arrival, now, exclude)
        if decision is not None and arrival.session is not None:
            self._begin(arrival, arrival.session, self.loads[decision.replica], now)
        if before is not None and not before.calls:
            self.sessions.rest(before, now)
        return decision

    def on_first_byte(self, call_id: str, now: float) -> None:
        super().on_first_byte(call_id, now)
        session = self.sessions.of_call(call_id)
        if session is not None:
            session.begun, session.moved = True, 0

    def on_finish(self, call_id: str, now: float, total_tokens: int | None) -> None:
        super().on_finish(call_id, now, total_tokens)
        session = self.sessions.of_call(call_id)
        if session is None:
            return
        arrival = self.sessions.take(call_id)
        session.ending |= arrival.last
        if total_tokens is not None:
            session.answered(arrival, total_tokens, now)
        if session.calls or not session.ending:
            session.recount()
        if not session.calls:
            self._rest_or_end(session, now)

    def end(self, session: SessionKey) -> None:
        known = self.sessions.get(session)
        if known is not None:
            known.ending = True
            if not known.calls:
                self.sessions.end(known)

    def epoch(self, now: float) -> Sequence[Move]:
        self.sessions.expire(now)
        if self._stealing is None:
            return ()
        moves = self._stealing.look(list(self.loads.values()), self.sessions, now)
        for move in moves:
            for call_id in move.call_ids:
                self._leave(call_id)
                self._enter(call_id, self.replicas[move.target])
        return moves

    # -- choice ---------------------------------------------------------------------------------

    def choose(
        self, arrival: Arrival, accepting: Sequence[Replica], now: float
    ) -> tuple[Replica | None, str]:
        if arrival.session is None:
            return fewest_calls(open_to_new(accepting)), "least_loaded"
        session = self.sessions.get(arrival.session)
        if session is not None and not session.lost:
            return self._for_known(session, arrival, accepting, now)
        kept = self._keeping(arrival.session, accepting)
        if kept is not None:
            return kept, "report"
        root = self.sessions.get(arrival.parent) if arrival.parent is not None else None
        if root is not None and root.home is not None and not root.lost:
            home = root.home
            roomy = home.share(arrival.prompt_tokens) <= self.settings.overload_share
            if home.replica in open_to_new(accepting) and roomy:
                return home.replica, "parent"
        return self._for_new(arrival, accepting), "new"

    def _for_known(
        self, session: Session, arrival: Arrival, accepting: Sequence[Replica], now: float
    ) -> tuple[Replica | None, str]:
        home = session.home
        if home is None or home.replica not in accepting:
            return self._for_new(arrival, accepting), "failover"
        if self._stealing is not None:
            others = [self.loads[replica.name] for replica in open_to_new(accepting)]
            better = self._stealing.better_home(session, others, now)
            if better is not None:
                return better.replica, "moved"
        return home.replica, "home"

    def _keeping(self, session: SessionKey, accepting: Sequence[Replica]) -> Replica | None:
        """A replica whose engine says that it has the session."""
        loads = (self.loads[replica.name] for replica in accepting)
        return rendezvous(
            session, (x.replica for x in loads if session in x.kept or session in x.held)
        )

    def _for_new(self, arrival: Arrival, accepting: Sequence[Replica]) -> Replica | None:
        """Where a session fits best that is nowhere yet, or nowhere any more."""
        candidates = open_to_new(accepting)
        if not candidates or arrival.session is None:
            return None
        settings = self.settings
        scored = self._scored(arrival, arrival.session, candidates)
        least = min(score for score, _ in scored)
        warm = [
            (score, replica)
            for score, replica in scored
            if score <= least + settings.warm_share
            and self.loads[replica.name].is_warm(arrival.prefix)
        ]
        chosen = warm or scored
        best = min(score for score, _ in chosen) + settings.tie_share
        return rendezvous(arrival.session, (r for score, r in chosen if score <= best))

    def _scored(
        self, arrival: Arrival, key: SessionKey, candidates: Sequence[Replica]
    ) -> list[tuple[float, Replica]]:
        """The replicas where a new session has room, or else all, with their load: 1 is the mean.

        Half of it is KV, half how many sessions are under way: where KV is not short it is these
        that make each other slow. Where nothing has room, KV alone counts.
        """
        pools = [load.kv_tokens for load in self.loads.values() if load.kv_tokens]
        pool = int(fmean(pools)) if pools else 0
        agent = self._classes.get((key[0], arrival.prefix))
        need = expected_need(agent, arrival.prompt_tokens, agent.remaining_calls(0))
        limit = self.settings.overload_share
        roomy = [r for r in candidates if self.loads[r.name].share(need, pool) <= limit]
        loads = [self.loads[replica.name] for replica in roomy or candidates]
        shares = _relative([load.share(pool=pool) for load in loads])
        if roomy:
            crowds = _relative([load.agents() / (load.kv_tokens or pool or 1) for load in loads])
            shares = [(share + crowd) / 2 for share, crowd in zip(shares, crowds, strict=True)]
        return list(zip(shares, roomy or candidates, strict=True))

    # -- sessions -------------------------------------------------------------------------------

    def _begin(self, arrival: Arrival, key: SessionKey, home: Load, now: float) -> None:
        """A call of a session has been placed at `home`."""
        session = self.sessions.get(key)
        if session is None:
            agent = self._classes.get((key[0], arrival.prefix))
            session = Session(key, agent, arrival.prefix, calls_left=agent.remaining_calls(0))
            self.sessions.add(session)
        self.sessions.begin(session, arrival, now)
        session.tokens = max(session.tokens, arrival.prompt_tokens)
        if session.home is home and not session.lost:
            session.recount()
        else:
            if session.home is not None:
                session.home.release(key)
            session.settle(home)
            home.receive(key, session.need)
        home.warm(arrival.prefix)

    def _take(self, call_id: str) -> Session | None:
        """A call that is placed again is not in flight meanwhile; returns whose it is."""
        session = self.sessions.of_call(call_id)
        if session is not None:
            self.sessions.take(call_id)
        return session

    def _rest_or_end(self, session: Session, now: float) -> None:
        if session.ending:
            self.sessions.end(session)
        else:
            self.sessions.rest(session, now)


def _relative(amounts: Sequence[float]) -> list[float]:
    """Each over the mean of all; all 0 if that is."""
    mean = fmean(amounts)
    return [amount / mean if mean else 0.0 for amount in amounts]


PLACERS: dict[str, Callable[[Settings], Placer]] = {
    "saga": SagaPlacer,
    "round_robin": lambda _: RoundRobin(),
    "session": lambda _: BySession(),
    "least_loaded": lambda _: LeastLoaded(),
}


def make_placer(name: str, settings: Settings | None = None) -> Placer:
    """The policy called `name`. Raises ValueError that lists those there are."""
    if name not in PLACERS:
        raise ValueError(f"{name!r} is no policy of the router; there are {', '.join(PLACERS)}")
    return PLACERS[name](settings or Settings())
