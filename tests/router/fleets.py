"""A small fleet of replicas in front of a placer, with every report written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vllm_saga.router.fleet import Arrival, Decision, EngineReport, HeldCall, SessionKey
from vllm_saga.router.placement import SagaPlacer, Settings

POOL = 100_000


class Fleet:
    """`SagaPlacer` over replicas a, b, c, ...; its clock is `now`, its calls are numbered."""

    def __init__(self, replicas: int = 3, settings: Settings | None = None) -> None:
        self.placer = SagaPlacer(settings)
        self.names = [chr(ord("a") + index) for index in range(replicas)]
        self.now = 0.0
        self._numbers = itertools.count()
        for name in self.names:
            self.placer.add(name)

    def report(
        self,
        name: str,
        used: int = 0,
        held: Sequence[HeldCall] = (),
        sessions: Sequence[SessionKey] = (),
        **fields: object,
    ) -> None:
        said = {"started": "1", "running": 0, "waiting": 0, "prefill_tokens_per_s": 10_000.0}
        said |= {"kv_tokens": POOL, "resident": 1, **fields}
        self.placer.on_report(
            name,
            EngineReport(
                at=self.now, used_tokens=used, held_calls=tuple(held), sessions=tuple(sessions),
                **said,  # type: ignore[arg-type]
            ),
        )  # fmt: skip

    def report_all(self, used: int = 0, **fields: object) -> None:
        for name in self.names:
            self.report(name, used, **fields)  # type: ignore[arg-type]

    def place(
        self,
        session: str | None,
        tokens: int = 1_000,
        exclude: Sequence[str] = (),
        call_id: str | None = None,
        tenant: str = "",
        **fields: object,
    ) -> tuple[str, Decision | None]:
        """A call arrives; returns its id and where it goes."""
        call_id = call_id or f"call-{next(self._numbers)}"
        key = None if session is None else (tenant, session)
        arrival = Arrival(call_id, key, tokens, **fields)  # type: ignore[arg-type]
        return call_id, self.placer.place(arrival, self.now, exclude)

    def call(
        self,
        session: str,
        tokens: int = 1_000,
        output: int = 100,
        took: float = 1.0,
        **more: object,
    ) -> Decision:
        """A call from its arrival to its end."""
        call_id, decision = self.place(session, tokens, **more)  # type: ignore[arg-type]
        assert decision is not None
        self.now += took
        self.placer.on_first_byte(call_id, self.now)
        self.placer.on_finish(call_id, self.now, tokens + output)
        return decision

    def home(self, session: str) -> str:
        known = self.placer.sessions.get(("", session))
        assert known is not None and known.home is not None
        return known.home.replica.name


def held(session: str, tokens: int = 1_000, held_s: float = 30.0, new: bool = True) -> HeldCall:
    return HeldCall("", session, new, held_s, tokens)


def check_integrity(placer: SagaPlacer) -> None:
    """What must be true between any two events."""
    for name, load in placer.loads.items():
        here = [s for s in placer.sessions if s.home is load and s.run == load.run]
        assert abs(load.own - sum(session.need for session in here)) < 1.0 + 1e-6 * load.own
        assert load.replica is placer.replicas[name]
    for session in placer.sessions:
        assert session.need >= 0.0
        assert not (session.stale and (session.calls or session.need))
        for call_id in session.calls:
            assert placer.sessions.of_call(call_id) is session
    in_flight = [call_id for replica in placer.replicas.values() for call_id in replica.calls]
    assert len(in_flight) == len(set(in_flight))
