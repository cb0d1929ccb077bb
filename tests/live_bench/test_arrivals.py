"""Skewed arrivals: as skewed as asked, at any time, and nothing but the ids is another's."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.live import arrivals
from benchmarks.live.scale import ScaledCall, ScaledSession
from vllm_saga.router.fleet import Arrival
from vllm_saga.router.simple import BySession


def sessions(works: list[float]) -> list[ScaledSession]:
    call = ScaledCall(20, 0, 4, None, (), 0.0, 1.0)
    return [ScaledSession(f"s{k}", (call,), None, 0, w, 2.0) for k, w in enumerate(works)]


@given(
    st.integers(2, 4), st.floats(0.3, 0.95), st.lists(st.floats(1, 100), min_size=1, max_size=30)
)
def test_every_stretch_has_its_share(replicas: int, share: float, works: list[float]) -> None:
    names = [f"127.0.0.1:{9000 + k}" for k in range(replicas)]
    wanted = [share] + [(1 - share) / (replicas - 1)] * (replicas - 1)
    before = sessions(works)
    renamed = arrivals.skewed(before, names, share)
    done = dict.fromkeys(names, 0.0)
    for session in renamed:
        done[arrivals.home(session.session_id, names)] += arrivals.work(session)
        # Off by no more than the largest session.
        for name, part in zip(names, wanted, strict=True):
            assert done[name] - part * sum(done.values()) <= 2 * max(works) + 1e-6
    assert len({session.session_id for session in renamed}) == len(works)
    assert [replace(new, session_id="") for new in renamed] == [
        replace(old, session_id="") for old in before
    ]


def test_it_is_our_router_s_hash() -> None:
    names = ["127.0.0.1:9000", "127.0.0.1:9001"]
    placer = BySession()
    for name in names:
        placer.add(name)
    for session in arrivals.skewed(sessions([1.0] * 12), names, 2 / 3):
        key = ("", session.session_id)
        decision = placer.place(Arrival(session.session_id, key, 20), 0.0)
        assert decision is not None
        assert decision.replica == arrivals.home(session.session_id, names)
