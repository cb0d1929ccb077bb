"""Which engine a call goes to: the ways rivals and plain routers choose, and this project's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from vllm_saga.router.replicas import score
from vllm_saga.simulator.records import LiveCall
from vllm_saga.simulator.routed import saga_router, saga_router_without_stealing
from vllm_saga.simulator.routing import Choice, Placement

# A prefix hit is worth queueing behind this many more calls than the least loaded engine has.
_BOUNDED_LOAD = 1.25
_SLACK_CALLS = 4


def round_robin() -> Placement:
    """Every call to the next engine, whatever it continues."""
    turn = itertools.count()
    return Choice(lambda call, loads: next(turn) % len(loads))


def sticky() -> Placement:
    """All calls of a session to the engine it hashes highest on: our router's policy `session`."""

    def place(call: LiveCall, loads: Sequence[int]) -> int:
        session = (call.session.tenant, call.session.id)
        return max(range(len(loads)), key=lambda engine: score(session, str(engine)))

    return Choice(place)


def least_loaded() -> Placement:
    """A new session to the engine with the fewest calls in flight; then it stays there."""
    homes: dict[str, int] = {}

    def place(call: LiveCall, loads: Sequence[int]) -> int:
        home = homes.get(call.session.id)
        if home is None:
            home = homes[call.session.id] = min(range(len(loads)), key=loads.__getitem__)
        return home

    return Choice(place)


def prefix_aware() -> Placement:
    """The engine that served the longest prefix of this prompt, if its load is bounded.

    Approximate, as routers that see no KV events are: what was sent is taken for cached. Load is
    bounded by 1.25 x the mean + 4 calls; otherwise the least loaded engine takes the call.
    """
    homes: dict[str, int] = {}

    def place(call: LiveCall, loads: Sequence[int]) -> int:
        shared = call.session.trace.shared_prefix
        group = f"group/{shared.group}" if shared else None
        bound = _BOUNDED_LOAD * sum(loads) / len(loads) + _SLACK_CALLS
        for key in (call.session.id, group):
            home = homes.get(key) if key else None
            if home is not None and loads[home] <= bound:
                break
        else:
            home = min(range(len(loads)), key=loads.__getitem__)
        homes[call.session.id] = home
        if group:
            homes.setdefault(group, home)
        return home

    return Choice(place)


PLACEMENTS: dict[str, Callable[[], Placement]] = {
    "round_robin": round_robin,
    "sticky": sticky,
    "least_loaded": least_loaded,
    "prefix_aware": prefix_aware,
    "saga": saga_router,
    "saga-nosteal": saga_router_without_stealing,
}
