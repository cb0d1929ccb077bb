"""Whose turn it is among tenants: the bound, no credit, no monopoly, no effect on one tenant."""

from __future__ import annotations

import math
import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.policy.fairness import NEUTRAL, OTHER, FairShare

TENANTS = ("a", "b", "c", "d")
events = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "first", "charge", "withdraw"]),
        st.integers(0, len(TENANTS) - 1),
        st.floats(0.0, 100.0),
        st.floats(0.1, 50.0),
    ),
    max_size=120,
)


class Watched:
    """A FairShare, and beside it what its promise speaks of: v, w and u of every tenant."""

    def __init__(self, weights: list[float], window_s: float) -> None:
        self.weights = dict(zip(TENANTS, weights, strict=True))
        self.window_s = window_s
        self.share = FairShare(self.weights, window_s)
        self.waiting: dict[str, list[int]] = {tenant: [] for tenant in TENANTS}
        self.owner: dict[int, str] = {}
        self.charged: dict[str, float] = defaultdict(float)
        self.now, self.count = 0.0, 0

    def happens(self, what: str, index: int, seconds: float, size: float) -> None:
        tenant, own = TENANTS[index], self.waiting[TENANTS[index]]
        self.now += seconds / 10
        if what == "arrive":
            self.count += 1
            self.owner[self.count] = tenant
            own.append(self.count)
            self.share.arrive(tenant, self.count, self.now, self.now, work_s=size, due_s=seconds)
        elif what == "charge":
            self.share.charge(tenant, seconds, size, self.now)
            self.charged[tenant] += seconds + size
        elif what == "withdraw" and own:
            self.share.leave(own.pop())
        elif what == "first":
            self.let_in()

    def let_in(self) -> str | None:
        workflow = self.share.first(self.now)
        if workflow is None:
            return None
        tenant = self.owner[workflow]
        self.waiting[tenant].remove(workflow)
        self.share.leave(workflow)
        self.charged[tenant] = 0.0
        return tenant

    def check(self) -> None:
        had = {name: own["virtual_s"] for name, own in self.share.state().items()}
        competing = [tenant for tenant in TENANTS if self.waiting[tenant]]
        for i in competing:
            for j in competing:
                bound = self.window_s + self.charged[i] / self.weights[i]
                assert had[i] - had[j] <= bound + 1e-6


@settings(max_examples=300)
@given(
    st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4),
    st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    events,
)
def test_of_two_that_wait_none_leads_by_more_than_the_window_and_what_it_has_in_flight(
    weights, window_s, happenings
):
    watched = Watched(weights, window_s)
    for event in happenings:
        watched.happens(*event)
        watched.check()


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4), st.integers(0, 10**6))
def test_service_of_tenants_that_always_wait_is_as_their_weights(weights, seed):
    rng = random.Random(seed)
    watched = Watched(weights, 30.0)
    total: dict[str, float] = defaultdict(float)
    flight = 5
    late: list[tuple[str, float]] = []
    for index in 2 * list(range(len(TENANTS))):
        watched.happens("arrive", index, 1.0, 1.0)
    for _ in range(400):
        tenant = watched.let_in()
        watched.happens("arrive", TENANTS.index(tenant), 1.0, rng.uniform(0, 50))
        # Known only after others have been let in.
        late.append((tenant, rng.uniform(0.0, 20.0)))
        if len(late) > flight:
            done, seconds = late.pop(rng.randrange(len(late)))
            watched.share.charge(done, seconds, 0.0, watched.now)
            total[done] += seconds
    most = {t: 30.0 + 20.0 * (flight + 2) / watched.weights[t] for t in TENANTS}
    for i in TENANTS:
        for j in TENANTS:
            lead = total[i] / watched.weights[i] - total[j] / watched.weights[j]
            assert lead <= max(most.values())


def test_nobody_starves_beside_tenants_that_are_always_more_urgent():
    share = FairShare(window_s=10.0)
    share.arrive("meek", "meek", 0.0)
    for number in range(100):
        now = float(number)
        share.arrive("pushy", number, now, work_s=100.0, due_s=now)
        if share.first(now) == "meek":
            break
        share.leave(number)
        share.charge("pushy", 1.0, 0.0, now)
    assert number == 5


def test_who_was_away_has_saved_up_half_a_window_and_no_more():
    share = FairShare(window_s=20.0)
    share.arrive("a", "a", 0.0)
    share.arrive("b", "b", 0.0)
    for _ in range(50):
        for tenant in "ab":
            share.charge(tenant, 10.0, 0.0, 0.0)
    share.arrive("late", "late", 0.0)
    had = {name: own["virtual_s"] for name, own in share.state().items()}
    assert had == {"a": 500.0, "b": 500.0, "late": 490.0}


def test_who_needs_little_goes_before_a_tenant_that_always_waits():
    share = FairShare(window_s=20.0)
    share.arrive("small", "small-1", 0.0)
    share.arrive("busy", 0, 0.0, work_s=10.0, due_s=15.0)
    share.leave("small-1")
    share.arrive("other", "other", 0.0)
    for number in range(1, 50):
        share.leave(number - 1)
        share.arrive("busy", number, 0.0, turn=-1.0, work_s=10.0, due_s=15.0)
        share.charge("busy", 10.0, 0.0, 0.0)
        share.charge("other", 10.0, 0.0, 0.0)
    share.arrive("small", "small-2", 0.0)
    assert share.first(0.0) == "small-2"


def test_more_workflows_of_a_tenant_are_no_larger_share():
    share = FairShare(window_s=10.0)
    for number in range(40):
        share.arrive("many", ("many", number), 0.0)
    for number in range(10):
        share.arrive("few", ("few", number), 0.0)
    let_in = []
    for _ in range(20):
        tenant, number = share.first(0.0)
        share.leave((tenant, number))
        share.charge(tenant, 5.0, 0.0, 0.0)
        let_in.append(tenant)
    assert 9 <= let_in.count("few") <= 10


def test_a_tenant_whose_weight_is_three_gets_three_times_as_much():
    share = FairShare({"three": 3.0, "one": 1.0}, window_s=5.0)
    let_in = []
    for number in range(80):
        share.arrive("three", ("three", number), 0.0)
        share.arrive("one", ("one", number), 0.0)
    for _ in range(80):
        workflow = share.first(0.0)
        share.leave(workflow)
        share.charge(workflow[0], 1.0, 0.0, 0.0)
        let_in.append(workflow[0])
    assert 58 <= let_in.count("three") <= 62


def test_a_tenant_that_is_hopelessly_late_does_not_keep_the_engine_to_itself():
    share = FairShare(window_s=10.0)
    for number in range(50):
        share.arrive("late", ("late", number), 0.0, work_s=1e6, due_s=-1e6)
        share.arrive("punctual", ("punctual", number), 0.0, work_s=1.0, due_s=1e6)
    let_in = []
    for _ in range(40):
        workflow = share.first(0.0)
        share.leave(workflow)
        share.charge(workflow[0], 2.0, 0.0, 0.0)
        let_in.append(workflow[0])
    assert let_in[0] == "late" and 17 <= let_in.count("punctual") <= 20


def test_within_the_window_the_more_urgent_goes_first_and_being_late_adds_nothing():
    share = FairShare()
    share.arrive("calm", "calm", 0.0, work_s=10.0, due_s=100.0)
    share.arrive("urgent", "urgent", 0.0, work_s=10.0, due_s=20.0)
    assert share.first(0.0) == "urgent"
    assert share.place("calm", 0.0).calm == pytest.approx(-0.1)
    assert share.place("calm", 50.0).calm == pytest.approx(-0.2)
    share.arrive("late", "late", 0.0, work_s=1000.0, due_s=-1e9)
    share.arrive("urgent", "urgent-2", 0.0, work_s=10.0, due_s=15.0)
    assert share.place("late", 0.0).calm == -1.0
    assert share.first(0.0) == "urgent"


def test_what_nobody_else_waited_for_is_not_charged():
    share = FairShare()
    share.charge("a", 100.0, 100.0, 0.0)
    share.arrive("a", "a", 0.0)
    share.charge("a", 100.0, 100.0, 0.0)
    share.arrive("b", "b", 0.0)
    assert share.place("a", 0.0).lead_s == share.place("b", 0.0).lead_s == 0.0
    share.charge("a", 20.0, 30.0, 0.0)
    assert share.place("a", 0.0).lead_s == 50.0
    assert share.state()["a"]["gpu_s"] == 220.0


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.floats(0, 1e6)), min_size=1))
def test_one_tenant_alone_is_served_as_residency_always_did(waits):
    share = FairShare()
    for number, (priority, new, turn) in enumerate(waits):
        share.arrive(
            "only", number, 0.0, turn, priority=priority, new=new, work_s=turn, due_s=1e6 - turn
        )
        share.charge("only", turn, turn, 0.0)
        assert share.place("only", 0.0) == NEUTRAL
    expected = sorted(range(len(waits)), key=lambda number: (*waits[number], number))
    served = []
    while (workflow := share.first(1.0)) is not None:
        share.leave(workflow)
        served.append(workflow)
    assert served == expected


def test_priority_comes_before_fairness_and_returning_before_new_within_the_window():
    share = FairShare(window_s=10.0)
    share.arrive("a", "a", 0.0, turn=1.0)
    share.arrive("b", "b", 0.0, turn=2.0, new=False)
    assert share.first(0.0) == "b"
    share.charge("b", 6.0, 0.0, 0.0)
    assert share.first(0.0) == "a"
    share.arrive("b", "b-first", 0.0, priority=-1)
    assert share.first(0.0) == "b-first"


def test_a_wait_told_again_moves_and_a_second_leave_is_nothing():
    share = FairShare()
    share.arrive("a", 1, 0.0, turn=1.0)
    share.arrive("a", 2, 0.0, turn=2.0)
    share.arrive("a", 2, 0.0, turn=0.0)
    assert share.first(0.0) == 2
    for _ in range(2):
        share.leave(2)
    assert share.first(0.0) == 1
    share.leave(1)
    assert share.first(0.0) is None and share.place("a", 0.0) == NEUTRAL


def test_a_million_names_take_no_more_memory_and_cannot_push_anybody_out():
    share = FairShare({"paying": 2.0}, limit=50, expiry_s=1e9)
    share.arrive("paying", "paying", 0.0)
    share.charge("early", 1.0, 0.0, 0.0)
    for number in range(1_000_000):
        share.charge(f"name-{number}", 1.0, 0.0, float(number))
    assert len(share._accounts) == 50
    assert {"paying", "early", OTHER} <= share.state().keys()
    assert share.state()[OTHER]["gpu_s"] > 999_000
    for number in range(1000):
        share.arrive(f"name-{number}", number, 0.0)
    assert share.first(0.0) == "paying"
    for number in range(1000):
        share.leave(number)
    assert share.first(0.0) == "paying" and len(share._least) <= 52


def test_an_account_out_of_use_makes_room():
    share = FairShare(limit=2, expiry_s=60.0)
    for number in range(10):
        share.charge(f"name-{number}", 1.0, 0.0, 100.0 * number)
    assert {"name-8", "name-9"} <= share.state().keys() and len(share.state()) == 2


def test_without_room_for_any_account_all_share_one():
    share = FairShare(limit=0)
    share.arrive("a", "a", 0.0, turn=1.0)
    share.arrive("b", "b", 0.0, turn=0.0)
    assert share.place("a", 0.0) == NEUTRAL and share.first(0.0) == "b"


def test_lines_do_not_grow_with_what_was_withdrawn():
    share = FairShare()
    share.arrive("a", "stays", 0.0)
    share.arrive("b", "b", 0.0)
    for number in range(10_000):
        share.arrive("a", number, 0.0, turn=float(number))
        share.arrive("a", number, 0.0, turn=float(-number))
        share.leave(number)
    assert len(share._accounts["a"].line) < 100
    assert share.first(0.0) == "stays"


def test_jain_is_one_if_all_had_alike_and_less_if_one_had_more():
    share = FairShare({"double": 2.0})
    assert share.jain() == 1.0
    share.charge("double", 2.0, 2.0, 0.0)
    share.charge("single", 1.0, 1.0, 0.0)
    assert share.jain() == pytest.approx(1.0)
    share.charge("single", 98.0, 0.0, 0.0)
    assert 0.5 < share.jain() < 0.6


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_means_nothing_is_refused_by_name(weight):
    with pytest.raises(ValueError, match="'x'"):
        FairShare({"x": weight})
