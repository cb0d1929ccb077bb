"""Who is there and what is under way: the part of a router's knowledge that every policy keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from vllm_saga.router.fleet import Arrival, Decision, EngineReport, Move, SessionKey


@dataclass(eq=False, slots=True)
class Replica:
    """An engine as the router sees it. `calls`: in flight there, by call id; True once begun."""

    name: str
    accepting: bool = True
    draining: bool = False
    calls: dict[str, bool] = field(default_factory=dict)


def score(session: SessionKey, replica: str) -> bytes:
    """How high a session hashes on the replica of this name: the same in every process."""
    named = "\0".join((*session, replica)).encode("utf-8", "surrogatepass")
    return blake2b(named, digest_size=8).digest()


def rendezvous(session: SessionKey, replicas: Iterable[Replica]) -> Replica | None:
    """The replica on which a session hashes highest, whatever their order.

    When a replica joins or leaves, only the sessions that it gains or had change their place.
    """
    return max(replicas, key=lambda replica: score(session, replica.name), default=None)


class BasePlacer:
    """Replicas and calls in flight; what a policy adds is `choose`, and more where it needs it."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self._where: dict[str, Replica] = {}

    # -- replicas -------------------------------------------------------------------------------

    def add(self, replica: str) -> None:
        self.replicas.setdefault(replica, Replica(replica))

    def remove(self, replica: str) -> None:
        gone = self.replicas.pop(replica, None)
        if gone is not None:
            for call_id in gone.calls:
                del self._where[call_id]

    def set_accepting(self, replica: str, accepting: bool) -> None:
        if replica in self.replicas:
            self.replicas[replica].accepting = accepting

    def set_draining(self, replica: str, draining: bool) -> None:
        if replica in self.replicas:
            self.replicas[replica].draining = draining

    # -- calls ----------------------------------------------------------------------------------

    def place(self, arrival: Arrival, now: float, exclude: Collection[str] = ()) -> Decision | None:
        self._leave(arrival.call_id)
        accepting = [r for r in self.replicas.values() if r.accepting and r.name not in exclude]
        chosen, reason = self.choose(arrival, accepting, now)
        if chosen is None:
            return None
        self._enter(arrival.call_id, chosen)
        return Decision(chosen.name, reason)

    def choose(
        self, arrival: Arrival, accepting: Sequence[Replica], now: float
    ) -> tuple[Replica | None, str]:
        """The replica of a call and why; None if none of `accepting` may take it."""
        raise NotImplementedError

    def on_first_byte(self, call_id: str, now: float) -> None:
        replica = self._where.get(call_id)
        if replica is not None:
            replica.calls[call_id] = True

    def on_finish(self, call_id: str, now: float, total_tokens: int | None) -> None:
        self._leave(call_id)

    def on_report(self, replica: str, report: EngineReport) -> None:
        """Nothing here: only some policies read reports."""

    def end(self, session: SessionKey) -> None:
        """Nothing here: only some policies remember sessions."""

    def epoch(self, now: float) -> Sequence[Move]:
        return ()

    def _enter(self, call_id: str, replica: Replica) -> None:
        replica.calls[call_id] = False
        self._where[call_id] = replica

    def _leave(self, call_id: str) -> None:
        replica = self._where.pop(call_id, None)
        if replica is not None:
            del replica.calls[call_id]


def fewest_calls(replicas: Iterable[Replica]) -> Replica | None:
    """The replica with the fewest calls in flight; of several, the first by name."""
    return min(replicas, key=lambda r: (len(r.calls), r.name), default=None)


def open_to_new(accepting: Sequence[Replica]) -> list[Replica]:
    """Of those that accept calls, those that also take new sessions."""
    return [replica for replica in accepting if not replica.draining]
