"""Where calls go: home, where the engines say, where a workflow fits; and through every failure."""

from __future__ import annotations

from collections import Counter

import pytest
from fleets import POOL, Fleet, check_integrity, held
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.policy.gaps import DOUBT
from vllm_saga.router.fleet import Arrival
from vllm_saga.router.placement import PLACERS, SagaPlacer, Settings, make_placer


def test_unknown_policies_are_refused_by_name():
    with pytest.raises(ValueError, match="no policy of the router; there are saga, round_robin"):
        make_placer("best")


@pytest.mark.parametrize("name", PLACERS)
def test_every_policy_keeps_to_who_accepts(name):
    placer = make_placer(name)
    calls = [Arrival(f"c{n}", ("", f"s{n}"), 100) for n in range(40)]
    assert placer.place(calls[0], 0.0) is None
    for replica in "abcd":
        placer.add(replica)
    placer.set_accepting("a", False)
    placer.set_draining("b", True)
    chosen = {placer.place(call, 0.0, exclude=["c"]).replica for call in calls}
    assert chosen == {"d"}
    placer.remove("d")
    assert placer.place(Arrival("last", ("", "new"), 100), 0.0, exclude=["c"]) is None
    for call in calls:
        placer.on_first_byte(call.call_id, 1.0)
        placer.on_finish(call.call_id, 1.0, None)
    placer.set_accepting("a", True)
    assert {placer.place(call, 0.0).replica for call in calls} <= {"a", "c"}


@pytest.mark.parametrize("name", PLACERS)
def test_every_policy_shares_the_work(name):
    placer = make_placer(name)
    for replica in "abcd":
        placer.add(replica)
    where = Counter()
    for number in range(400):
        where[placer.place(Arrival(f"c{number}", ("", f"s{number}"), 100), 0.0).replica] += 1
    assert min(where.values()) > 60


def test_least_loaded_counts_calls_in_flight():
    placer = make_placer("least_loaded")
    placer.add("a"), placer.add("b")
    for number in range(4):
        placer.place(Arrival(f"c{number}", None, 100), 0.0)
    for call_id in ("c1", "c3"):
        placer.on_finish(call_id, 1.0, 200)
    assert [placer.place(Arrival(f"d{n}", None, 100), 1.0).replica for n in range(2)] == ["b", "b"]


def test_rendezvous_moves_no_more_than_the_sessions_of_who_left():
    placer = make_placer("session")
    for replica in "abcde":
        placer.add(replica)

    def homes():
        return {
            n: placer.place(Arrival("call", ("t", f"s{n}"), 1), 0.0).replica for n in range(200)
        }

    before = homes()
    placer.remove("c")
    after = homes()
    assert all(before[n] in (after[n], "c") for n in before)


def test_sessions_stay_at_home_whatever_the_load():
    fleet = Fleet()
    fleet.report_all()
    home = fleet.call("s").replica
    fleet.report(home, used=POOL, held=[held("x"), held("y")])
    for turn in range(5):
        decision = fleet.call("s", tokens=2_000 + 500 * turn)
        assert (decision.replica, decision.reason) == (home, "home")
    check_integrity(fleet.placer)


def test_tenants_sessions_are_told_apart():
    fleet = Fleet(replicas=8)
    homes = {fleet.place("s", tenant=f"t{n}")[1].replica for n in range(24)}
    assert len(homes) > 3
    assert len(fleet.placer.sessions) == 24


def test_new_workflows_go_where_the_reports_say_there_is_room():
    fleet = Fleet()
    fleet.report("a", used=90_000, resident=9)
    fleet.report("b", used=30_000, resident=3)
    fleet.report("c", used=80_000, resident=8)
    assert {fleet.place(f"s{n}", tokens=1_000)[1].replica for n in range(5)} == {"b"}


def test_where_kv_is_not_short_agents_are_spread():
    fleet = Fleet(replicas=2)
    fleet.report("a", used=30_000, resident=12)
    fleet.report("b", used=40_000, resident=2)
    assert {fleet.place(f"s{n}", tokens=1_000)[1].replica for n in range(5)} == {"b"}


def test_a_full_replica_is_chosen_only_if_all_are():
    fleet = Fleet(replicas=2)
    fleet.report("a", used=60_000, resident=30)
    fleet.report("b", used=99_500, resident=1)
    assert fleet.place("s", tokens=1_000)[1].replica == "a"
    fleet.report("a", used=99_800, resident=1)
    fleet.report("b", used=99_500, resident=30)
    assert fleet.place("t", tokens=1_000)[1].replica == "b"


def test_held_calls_are_load_too():
    fleet = Fleet(replicas=2)
    fleet.report("a", used=50_000, held=[held(f"h{n}", tokens=20_000) for n in range(3)])
    fleet.report("b", used=90_000)
    assert fleet.place("s")[1].replica == "b"


def test_what_was_placed_since_the_report_counts():
    fleet = Fleet(replicas=2)
    fleet.report("a", used=40_000)
    fleet.report("b", used=50_000)
    where = [fleet.place(f"s{n}", tokens=5_000)[1].replica for n in range(10)]
    assert where[0] == "a"
    assert Counter(where)["b"] in (3, 4, 5)


def test_predicted_growth_counts_before_it_has_come():
    fleet = Fleet(replicas=2)
    fleet.report_all()
    # Agents of kind 1 grow by 3,000 tokens a call; those of kind 2 make one call.
    for number in range(12):
        for turn in range(6):
            fleet.call(f"grow{number}", tokens=1_000 + 3_000 * turn, prefix=1, last=turn == 5)
        fleet.call(f"small{number}", tokens=1_000, prefix=2, last=True)
    fleet.placer.remove("a"), fleet.placer.add("a")
    fleet.placer.remove("b"), fleet.placer.add("b")
    grower = fleet.place("g", tokens=1_000, prefix=1)[1].replica
    small = [fleet.place(f"x{n}", tokens=1_000, prefix=2)[1].replica for n in range(2)]
    assert grower not in small


def test_a_warm_prefix_wins_while_loads_are_alike_and_no_longer():
    fleet = Fleet(replicas=4)
    fleet.report_all(used=50_000, resident=20)
    warm = fleet.place("first", prefix=7)[1].replica
    assert fleet.place("second", prefix=7)[1].replica == warm
    fleet.report(warm, used=60_000, resident=24)
    assert fleet.place("third", prefix=7)[1].replica != warm


def test_sub_agents_go_with_their_root_unless_it_is_full():
    fleet = Fleet(replicas=6)
    fleet.report_all()
    root = fleet.call("root").replica
    decision = fleet.place("sub", parent=("", "root"))[1]
    assert (decision.replica, decision.reason) == (root, "parent")
    fleet.report(root, used=POOL)
    assert fleet.place("sub2", parent=("", "root"))[1].replica != root
    assert fleet.place("sub3", parent=("", "unknown"))[1].reason == "new"


def test_calls_without_a_session_go_where_the_fewest_calls_are():
    fleet = Fleet(replicas=3)
    assert sorted(fleet.place(None)[1].replica for _ in range(6)) == list("aabbcc")
    assert len(fleet.placer.sessions) == 0


def test_routers_agree_on_new_sessions_without_talking():
    one, other = Fleet(replicas=8), Fleet(replicas=8)
    other.placer.remove("a"), other.placer.add("a")
    for fleet in (one, other):
        fleet.report_all(used=20_000)
    homes = [[fleet.call(f"s{n}").replica for n in range(50)] for fleet in (one, other)]
    assert homes[0] == homes[1]
    assert len(set(homes[0])) == 8


def test_a_restarted_router_finds_sessions_by_the_engines_reports():
    old = Fleet(replicas=4)
    old.report_all()
    homes = {}
    for number in range(40):
        homes[f"s{number}"] = old.call(f"s{number}", tokens=500 * number).replica
    restarted = Fleet(replicas=4)
    for name in restarted.names:
        own = [("", session) for session, home in homes.items() if home == name]
        restarted.report(name, used=10_000 * restarted.names.index(name), sessions=own)
    for session, home in homes.items():
        decision = restarted.call(session)
        assert (decision.replica, decision.reason) == (home, "report")
    assert restarted.call("s1").reason == "home"


def test_a_restarted_engine_has_nobodys_kv():
    fleet = Fleet(replicas=2)
    fleet.report_all(sessions=[])
    home = fleet.call("s").replica
    other = {"a": "b", "b": "a"}[home]
    fleet.report(home, used=50_000, started="2")
    decision = fleet.place("s")[1]
    assert (decision.replica, decision.reason) == (other, "new")
    check_integrity(fleet.placer)


def test_a_session_leaves_a_dead_replica_and_stays_away():
    fleet = Fleet(replicas=3)
    home = fleet.call("s").replica
    fleet.placer.set_accepting(home, False)
    moved = fleet.call("s")
    assert moved.replica != home and moved.reason == "failover"
    fleet.placer.set_accepting(home, True)
    assert fleet.call("s").replica == moved.replica
    check_integrity(fleet.placer)


def test_a_refused_call_is_placed_again_elsewhere_and_counts_once():
    fleet = Fleet(replicas=3)
    call_id, first = fleet.place("s")
    _, second = fleet.place("s", exclude=[first.replica], call_id=call_id)
    assert second.replica != first.replica
    assert sum(len(r.calls) for r in fleet.placer.replicas.values()) == 1
    assert fleet.place("s", exclude=fleet.names, call_id=call_id)[1] is None
    assert not any(r.calls for r in fleet.placer.replicas.values())
    check_integrity(fleet.placer)


def test_a_draining_replica_keeps_its_sessions_and_gets_no_others():
    fleet = Fleet(replicas=2)
    home = fleet.call("s").replica
    fleet.placer.set_draining(home, True)
    assert fleet.call("s").replica == home
    assert all(fleet.call(f"new{n}").replica != home for n in range(10))
    only = next(name for name in fleet.names if name != home)
    fleet.placer.set_accepting(only, False)
    assert fleet.place("newer")[1] is None


def test_a_replica_that_left_and_came_back_is_empty():
    fleet = Fleet(replicas=2)
    home = fleet.call("s", tokens=50_000).replica
    fleet.placer.remove(home), fleet.placer.add(home)
    assert fleet.placer.loads[home].own == 0.0
    assert fleet.call("s").reason == "new"
    check_integrity(fleet.placer)


@pytest.mark.parametrize("how", ["said", "last", "forgotten"])
def test_sessions_that_are_over_are_no_load(how):
    fleet = Fleet(replicas=2, settings=Settings(session_idle_s=600.0))
    home = fleet.call("s", tokens=50_000, last=how == "last").replica
    if how == "said":
        fleet.placer.end(("", "s"))
    elif how == "forgotten":
        fleet.now += 601.0
        fleet.placer.epoch(fleet.now)
    assert len(fleet.placer.sessions) == 0
    assert fleet.placer.loads[home].own == 0.0


def test_a_session_said_to_end_in_mid_call_ends_with_it():
    fleet = Fleet()
    call_id, _ = fleet.place("s")
    fleet.placer.end(("", "s"))
    assert len(fleet.placer.sessions) == 1
    fleet.placer.on_finish(call_id, 1.0, 1_100)
    assert len(fleet.placer.sessions) == 0


def test_who_is_long_away_is_no_load_but_still_at_home():
    fleet = Fleet(replicas=2)
    for turn in range(5):
        home = fleet.call("s", tokens=1_000 * (turn + 1)).replica
    fleet.now += 1_000.0
    fleet.placer.epoch(fleet.now)
    assert fleet.placer.loads[home].own == 0.0
    assert fleet.call("s", tokens=7_000).replica == home
    assert fleet.placer.loads[home].own > 7_000
    check_integrity(fleet.placer)


def test_whose_return_is_in_doubt_counts_as_ended_until_it_returns():
    fleet = Fleet(replicas=2)
    for turn in range(5):
        home = fleet.call("s", tokens=1_000 * (turn + 1)).replica
    session = fleet.placer.sessions.get(("", "s"))
    gaps, load = session.agent.gaps, fleet.placer.loads[home]
    promised = load.own
    doubt_s, patience_s = gaps.patience_s(DOUBT), gaps.patience_s(0.1)
    assert promised > 6_000 and doubt_s < patience_s / 2

    fleet.now += doubt_s - 0.1
    fleet.placer.epoch(fleet.now)
    assert gaps.record().ends == 0.0 and load.own == promised
    fleet.now += 0.2
    for _ in range(2):
        fleet.placer.epoch(fleet.now)
        assert gaps.record().ends == 1.0 and not session.stale
        assert 5_100 <= load.own < 6_000

    fleet.call("s", tokens=6_000)
    assert gaps.record().ends == 0.0 and gaps.returns == 5.0
    assert load.own > promised
    fleet.now += 1_000.0
    for _ in range(2):
        fleet.placer.epoch(fleet.now)
        assert gaps.record().ends == 1.0 and session.stale and load.own == 0.0
    check_integrity(fleet.placer)


def test_what_others_do_meanwhile_counts_for_who_is_away():
    fleet = Fleet(replicas=2)
    for number in range(40):
        fleet.call(f"s{number}", took=0.0)
    first = fleet.placer.sessions.get(("", "s0"))
    lasts_s = first.agent.gaps.patience_s(0.1)
    while not first.stale:
        fleet.now += 1.0
        fleet.placer.epoch(fleet.now)
    assert fleet.now < lasts_s / 2
    check_integrity(fleet.placer)


def test_idle_sessions_are_bounded():
    fleet = Fleet(settings=Settings(max_idle_sessions=50))
    for number in range(300):
        fleet.call(f"s{number}", took=0.01)
        fleet.placer.epoch(fleet.now)
    assert len(fleet.placer.sessions) == 50
    check_integrity(fleet.placer)


EVENT = st.tuples(
    st.sampled_from(
        ["place", "place", "place", "byte", "finish", "finish", "report", "restart", "down", "up",
         "drain", "leave", "join", "end", "epoch", "wait", "refused"]
    ),
    st.integers(0, 5),
    st.integers(0, 5),
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(EVENT, max_size=80))
def test_the_books_balance_after_any_sequence_of_events(events):
    fleet = Fleet(replicas=3, settings=Settings(max_idle_sessions=4, session_idle_s=100.0))
    placer: SagaPlacer = fleet.placer
    open_calls: list[str] = []
    for what, which, size in events:
        name = fleet.names[which % 3]
        if what == "place":
            call_id, decision = fleet.place(f"s{which}", tokens=9_000 * size, prefix=which % 2)
            open_calls += [call_id] if decision is not None else []
            if decision is not None:
                assert placer.replicas[decision.replica].accepting
        elif what == "refused" and open_calls:
            fleet.place(f"s{which}", tokens=100, exclude=[name], call_id=open_calls[0])
            open_calls.pop(0)
        elif what == "byte" and open_calls:
            placer.on_first_byte(open_calls[which % len(open_calls)], fleet.now)
        elif what == "finish" and open_calls:
            call_id = open_calls.pop(which % len(open_calls))
            placer.on_finish(call_id, fleet.now, 9_000 * size if size else None)
        elif what == "report":
            waiting = [held(f"s{which}", held_s=30.0 * size, new=size % 2 == 0)]
            fleet.report(name, used=20_000 * size, held=waiting, sessions=[("", f"s{size}")])
        elif what == "restart":
            fleet.report(name, started=str(size))
        elif what == "end":
            placer.end(("", f"s{which}"))
        elif what == "epoch":
            placer.epoch(fleet.now)
        elif what == "wait":
            fleet.now += 7.0 * size
        elif what in ("up", "down"):
            placer.set_accepting(name, what == "up")
        elif what == "drain":
            placer.set_draining(name, size % 2 == 0)
        elif what == "leave":
            placer.remove(name)
        elif what == "join":
            placer.add(name)
        check_integrity(placer)
    idle = [session for session in placer.sessions if not session.calls]
    placer.epoch(fleet.now)
    assert len([s for s in placer.sessions if not s.calls]) <= min(len(idle), 4)


def test_how_many_calls_a_session_has_left_is_learned_from_all_that_have_ended():
    fleet = Fleet()
    fleet.report_all()
    for number in range(60):
        calls = 2 if number % 2 else 20
        for _ in range(calls):
            fleet.call(f"s{number}")
        fleet.placer.end(("", f"s{number}"))
    fleet.call("one")
    session = fleet.placer.sessions.get(("", "one"))
    assert 7.0 < session.calls_left < 15.0  # the mean of 1 and 19
    for _ in range(4):
        fleet.call("one")
    assert session.calls_left > 12.0
