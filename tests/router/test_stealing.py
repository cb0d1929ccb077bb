"""Work stealing: what moves, what it must save, and that nothing moves to and fro."""

from __future__ import annotations

from collections import defaultdict

import pytest
from fleets import POOL, Fleet, check_integrity, held
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.router.placement import Settings
from vllm_saga.router.stealing import Thresholds


def crowd(*waiting: str, tokens: int = 10_000, **fields: object) -> Fleet:
    """Replica a is full and holds a call of each of `waiting`; b has room."""
    fleet = Fleet(replicas=2)
    fleet.placer.set_draining("b", True)
    fleet.report_all()
    for session in waiting:
        fleet.place(session, tokens=tokens)
    fleet.placer.set_draining("b", False)
    line = [held(session, tokens=tokens, **fields) for session in waiting]  # type: ignore[arg-type]
    fleet.report("a", used=POOL, held=line)
    fleet.report("b", used=20_000)
    return fleet


def look(fleet: Fleet, after: float = 0.2):
    """Two epochs: the first one sees the room, the second one that it lasts."""
    first = list(fleet.placer.epoch(fleet.now))
    fleet.now += after
    return first + list(fleet.placer.epoch(fleet.now))


def test_a_held_new_workflow_moves_to_where_there_is_room():
    fleet = crowd("s")
    (move,) = look(fleet)
    assert (move.session, move.source, move.target) == (("", "s"), "a", "b")
    assert (move.call_ids, move.reason, move.cost_s) == (("call-0",), "new", 0.0)
    assert move.saved_s >= 30.0
    assert "call-0" in fleet.placer.replicas["b"].calls
    fleet.placer.on_finish("call-0", fleet.now, 10_100)
    assert fleet.call("s", tokens=11_000).replica == "b"
    check_integrity(fleet.placer)


def test_room_has_to_last():
    fleet = crowd("s")
    fleet.report("b", used=70_000)
    assert not look(fleet, after=0.05)
    assert look(fleet, after=0.06)


def test_a_load_twice_as_high_is_reason_enough():
    fleet = crowd("s")
    fleet.report("b", used=20_000, held=[held("other", tokens=100, held_s=1.0)])
    assert len(look(fleet)) == 1
    fleet = crowd("s")
    fleet.report("b", used=70_000, held=[held("other", tokens=100, held_s=1.0)])
    assert not look(fleet)


def test_nobody_moves_without_a_line_or_where_all_are_full():
    fleet = crowd()
    assert not look(fleet)
    fleet = crowd("s")
    fleet.report("b", used=POOL, held=[held("other", held_s=30.0)])
    assert not look(fleet)


@pytest.mark.parametrize("state", ["down", "draining"])
def test_nobody_moves_to_who_takes_no_new_sessions(state):
    fleet = crowd("s")
    if state == "down":
        fleet.placer.set_accepting("b", False)
    else:
        fleet.placer.set_draining("b", True)
    assert not look(fleet)


def test_one_session_an_epoch_until_there_is_neither_room_nor_a_load_twice_as_high():
    fleet = crowd(*(f"s{n}" for n in range(12)), tokens=15_000)
    moves = []
    for _ in range(20):
        epoch = list(fleet.placer.epoch(fleet.now))
        assert len(epoch) <= 1
        moves += epoch
        fleet.now += 0.1
    # b: 20,000 + 6 x 15,000; a: 100,000 + 6 x 15,000.
    assert len(moves) == 6
    check_integrity(fleet.placer)


def test_new_ones_first_then_those_without_kv_then_the_cheapest_is_not_worth_more_than_it_saves():
    fleet = Fleet(replicas=2)
    fleet.placer.set_draining("b", True)
    fleet.report_all()
    for session in ("cached", "lost"):
        fleet.call(session, tokens=20_000)
    for session in ("cached", "lost", "new"):
        fleet.place(session, tokens=21_000)
    fleet.placer.set_draining("b", False)
    line = [held(s, 21_000, held_s=40.0, new=s == "new") for s in ("cached", "lost", "new")]
    fleet.report("a", used=POOL, held=line, sessions=[("", "cached")])
    fleet.report("b")
    moves = []
    for _ in range(5):
        moves += fleet.placer.epoch(fleet.now)
        fleet.now += 0.15
    assert [(move.session[1], move.reason) for move in moves] == [
        ("new", "new"), ("lost", "uncached"), ("cached", "cached"),
    ]  # fmt: skip
    assert [move.cost_s for move in moves] == [0.0, 0.0, pytest.approx(2.1, rel=0.1)]


def test_a_move_that_costs_more_than_it_saves_is_not_made():
    def moves(held_s):
        fleet = Fleet(replicas=2)
        fleet.placer.set_draining("b", True)
        fleet.report_all()
        fleet.call("s", tokens=30_000)
        fleet.place("s", tokens=31_000)
        fleet.placer.set_draining("b", False)
        line = [held("s", 31_000, held_s=held_s, new=False)]
        # There is room: it will not be held for long, as far as anybody can tell.
        fleet.report("a", used=10_000, held=line, sessions=[("", "s")])
        fleet.report("b")
        return look(fleet)

    assert not moves(held_s=3.0)
    assert len(moves(held_s=5.0)) == 1


def test_a_session_with_a_call_that_has_begun_stays():
    fleet = crowd("s")
    fleet.placer.on_first_byte("call-0", fleet.now)
    assert not look(fleet)
    fleet = crowd("s")
    second, _ = fleet.place("s")
    fleet.placer.on_first_byte(second, fleet.now)
    assert not look(fleet)


def test_all_calls_of_a_session_move_together():
    fleet = crowd("s")
    second, _ = fleet.place("s")
    (move,) = look(fleet)
    assert set(move.call_ids) == {"call-0", second}


def test_who_has_moved_stays_for_a_while_and_one_call_is_not_moved_for_ever():
    thresholds = Thresholds(stick_s=20.0, moves_per_call=2)
    fleet = Fleet(replicas=2, settings=Settings(stealing=thresholds))
    fleet.report_all()
    fleet.place("s")
    moved_at = []
    for _ in range(2_000):
        home = fleet.home("s")
        other = {"a": "b", "b": "a"}[home]
        fleet.report(home, used=POOL, held=[held("s")])
        fleet.report(other)
        for move in fleet.placer.epoch(fleet.now):
            assert (move.source, move.target) == (home, other)
            moved_at.append(fleet.now)
        fleet.now += 0.1
    assert len(moved_at) == 2
    assert moved_at[1] - moved_at[0] >= 20.0


def test_without_stealing_nothing_moves():
    fleet = Fleet(replicas=2, settings=Settings(stealing=None))
    fleet.report_all()
    fleet.place("s")
    fleet.report("a", used=POOL, held=[held("s")])
    fleet.report("b", used=POOL, held=[held("s")])
    fleet.report({"a": "b", "b": "a"}[fleet.home("s")])
    assert not look(fleet)


def test_stock_engines_lose_a_session_at_its_next_call_if_they_lack_room():
    fleet = Fleet(replicas=2)
    fleet.report_all(resident=0)
    fleet.placer.set_draining("b", True)
    for number in range(6):
        fleet.call(f"s{number}", tokens=25_000)
    fleet.placer.set_draining("b", False)
    look(fleet)
    where = [fleet.call(f"s{number}", tokens=25_500) for number in range(6)]
    reasons = [decision.reason for decision in where]
    assert 2 <= reasons.count("moved") <= 3
    assert all((d.replica == "b") == (d.reason == "moved") for d in where)
    again = [fleet.call(f"s{number}", tokens=26_000) for number in range(6)]
    assert [d.replica for d in again] == [d.replica for d in where]
    check_integrity(fleet.placer)


def test_stock_engines_lose_new_calls_that_wait():
    fleet = Fleet(replicas=2)
    fleet.report_all(resident=0)
    fleet.placer.set_draining("b", True)
    for number in range(6):
        fleet.place(f"s{number}", tokens=25_000)
    fleet.placer.set_draining("b", False)
    fleet.report("a", used=POOL, resident=0, waiting=2)
    moves = look(fleet) + look(fleet) + look(fleet)
    assert {move.session[1] for move in moves} == {"s4", "s5"}


REPORT = st.tuples(
    st.integers(0, 130_000),
    st.lists(
        st.tuples(
            st.integers(0, 7), st.integers(0, 60_000), st.floats(0.0, 600.0), st.booleans()
        ),
        max_size=5,
    ),
    st.lists(st.integers(0, 7), max_size=4),
)  # fmt: skip
STEP = st.tuples(
    st.integers(0, 3), REPORT, st.sampled_from([0.0, 0.1, 0.3, 2.0]), st.integers(0, 15)
)


@settings(max_examples=200)
@given(st.lists(STEP, min_size=1, max_size=60))
def test_no_ping_pong_and_no_move_at_a_loss_whatever_the_reports_say(steps):
    limits = Thresholds()
    fleet = Fleet(replicas=4)
    moved: dict[str, list[float]] = defaultdict(list)
    begun: set[str] = set()
    for which, (used, line, kept), passes, session in steps:
        calls = [held(f"s{n}", tokens, held_s, new) for n, tokens, held_s, new in line]
        fleet.report(fleet.names[which], used, calls, [("", f"s{n}") for n in kept])
        if session < 8:
            fleet.place(f"s{session}", tokens=5_000 + used // 4, call_id=f"of s{session}")
            begun.discard(f"of s{session}")
        elif fleet.placer.sessions.of_call(f"of s{session - 8}"):
            begun.add(f"of s{session - 8}")
            fleet.placer.on_first_byte(f"of s{session - 8}", fleet.now)
        fleet.now += passes
        moves = fleet.placer.epoch(fleet.now)
        assert len({move.target for move in moves}) == len(moves)
        for move in moves:
            assert move.source != move.target
            assert move.saved_s > move.cost_s + limits.margin_s
            assert not begun.intersection(move.call_ids)
            assert fleet.home(move.session[1]) == move.target
            times = moved[move.session[1]]
            period = max(limits.stick_s, limits.stick_factor * move.cost_s)
            assert all(fleet.now - when >= since for when, since in times)
            times.append((fleet.now, period))
        check_integrity(fleet.placer)
    assert all(len(times) <= 1 + fleet.now / limits.stick_s for times in moved.values())
