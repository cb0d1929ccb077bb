"""Who may hold KV: exact counting, entry, holding, leaving, deadlines."""

from __future__ import annotations

import random

from helpers import BLOCK, arrival, chain_of, check_integrity, make_policy, prompt, run_call
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.policy.chain import common_prefix
from vllm_saga.policy.stepfit import Step


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_common_prefix_is_what_a_scan_finds(a, b):
    x, y = chain_of(a), chain_of(b)
    scan = 0
    while scan < min(len(x), len(y)) and x[scan] == y[scan]:
        scan += 1
    assert common_prefix(x, y) == scan


def test_a_shared_prefix_counts_once():
    policy = make_policy(pool_blocks=1000)
    system = prompt(1, 20)
    for index in range(5):
        tokens = [*system, *prompt(50 + index, 3)]
        policy.on_arrival(arrival(f"c{index}", tokens, f"s{index}"), 0.0)
    assert len(policy.residency.ledger) == 20 + 5 * 3
    check_integrity(policy)


def test_who_does_not_fit_is_held_until_a_resident_ends():
    policy = make_policy(pool_blocks=30, patience=0.0)
    policy.on_arrival(arrival("a", prompt(1, 15), "s1"), 0.0)
    policy.on_arrival(arrival("b", prompt(2, 15), "s2", last=True), 0.0)
    assert not policy.is_held("a") and policy.is_held("b")
    policy.on_finish("a", 15 * BLOCK, 0.1)
    assert policy.on_step(0.2) == []
    policy.on_arrival(arrival("a2", [*prompt(1, 15), 1], "s1", last=True), 0.3)
    policy.on_finish("a2", 15 * BLOCK + 1, 0.4)
    assert policy.on_step(0.5) == ["b"]
    assert not policy.is_held("b")
    check_integrity(policy)


def test_a_call_with_nothing_known_is_never_held_while_nothing_else_is():
    policy = make_policy(pool_blocks=10)
    for index in range(50):
        policy.on_arrival(arrival(f"c{index}", prompt(index, 8)), 0.0)
    assert policy.residency.held_calls == 0


def test_a_plain_call_beside_agents_runs_until_an_agent_has_to_wait():
    policy = make_policy(pool_blocks=30, patience=0.0)
    policy.on_arrival(arrival("agent", prompt(1, 25), "a"), 0.0)
    policy.on_arrival(arrival("plain", prompt(2, 20)), 0.0)
    assert not policy.is_held("plain")
    policy.on_arrival(arrival("waiting", prompt(3, 20), "b"), 0.0)
    policy.on_arrival(arrival("behind", prompt(4, 20)), 0.0)
    assert policy.is_held("waiting") and policy.is_held("behind")
    check_integrity(policy)


def test_held_calls_enter_returning_first_then_oldest_first():
    policy = make_policy(pool_blocks=40, patience=0.0, headroom=0.0)
    run_call(policy, arrival("old", prompt(1, 10), "old"), [], 0.0)
    policy.on_arrival(arrival("big", prompt(2, 26), "big"), 0.0)
    policy.on_arrival(arrival("new1", prompt(3, 12), "new1"), 1.0)
    policy.on_arrival(arrival("new2", prompt(4, 12), "new2"), 1.0)
    assert policy.is_held("new1") and policy.is_held("new2")
    big = next(w for w in policy.residency.residents if "big" in w.calls)
    old = next(w for w in policy.residency.residents if not w.calls)
    policy.residency.leave(old)
    policy.on_arrival(arrival("old2", [*prompt(1, 14)], "old"), 2.0)
    assert policy.is_held("old2")
    policy.on_finish("big", 26 * BLOCK, 3.0)
    policy.residency.leave(big)
    assert policy.on_step(3.1)[:2] == ["old2", "new1"]


def test_when_residents_outgrow_the_pool_the_youngest_idle_one_leaves():
    policy = make_policy(pool_blocks=40, patience=0.0, headroom=0.0)
    first = run_call(policy, arrival("a1", prompt(1, 10), "a"), [], 0.0)
    run_call(policy, arrival("b1", prompt(2, 10), "b"), [], 0.0)
    run_call(policy, arrival("c1", prompt(3, 10), "c"), [], 0.0)
    policy.on_arrival(arrival("a2", [*first, *prompt(4, 15)], "a"), 0.1)
    assert not policy.is_held("a2")
    names = {next(iter(w.sessions.values())).key[1] for w in policy.residency.residents}
    assert names == {"a", "b"}
    check_integrity(policy)


def test_every_hold_ends_at_its_deadline():
    policy = make_policy(pool_blocks=20, max_hold_s=5.0)
    policy.on_arrival(arrival("a", prompt(1, 15), "a"), 0.0)
    policy.on_arrival(arrival("b", prompt(2, 15), "b"), 1.0)
    assert policy.on_step(5.9) == []
    assert policy.on_step(6.0) == ["b"]
    assert policy.state()["forced"] == 1


def test_who_is_in_mid_task_may_be_given_a_shorter_deadline():
    policy = make_policy(pool_blocks=30, max_hold_s=60.0, max_step_hold_s=5.0)
    for name in ("a", "b"):
        run_call(policy, arrival(name, prompt(ord(name), 12), name), [], 0.0)
    policy.on_arrival(arrival("a2", prompt(ord("a"), 27), "a"), 1.0)
    assert not policy.is_held("a2")
    policy.on_arrival(arrival("b2", prompt(ord("b"), 27), "b"), 1.0)
    policy.on_arrival(arrival("c", prompt(3, 20), "c"), 1.0)
    assert policy.is_held("b2") and policy.is_held("c")
    assert policy.on_step(5.9) == []
    assert policy.on_step(6.0) == ["b2"]
    assert policy.on_step(59.0) == []
    assert policy.on_step(61.0) == ["c"]


def test_an_idle_engine_does_not_wait_for_a_resident_that_may_never_return():
    policy = make_policy(pool_blocks=20)
    run_call(policy, arrival("a", prompt(1, 15), "a"), [], 0.0)
    policy.on_arrival(arrival("b", prompt(2, 15), "b"), 0.1)
    assert policy.is_held("b")
    assert policy.on_step(0.2) == []
    assert policy.on_step(2.0) == ["b"]


def test_an_idle_engine_waits_from_the_moment_of_the_hold():
    policy = make_policy(pool_blocks=20)
    run_call(policy, arrival("a", prompt(1, 15), "a"), [], 0.0)
    policy.on_arrival(arrival("b", prompt(2, 15), "b"), 3.0)
    assert policy.on_step(3.1) == []
    assert policy.on_step(4.1) == ["b"]


def test_a_workflow_larger_than_the_pool_is_let_in_alone():
    policy = make_policy(pool_blocks=10)
    policy.on_arrival(arrival("a", prompt(1, 50), "a"), 0.0)
    assert not policy.is_held("a")


def test_an_edit_supersedes_the_old_tail_at_once():
    policy = make_policy(pool_blocks=1000)
    for other in range(2):
        run_call(
            policy, arrival(f"o{other}", prompt(1, 4) + prompt(90 + other, 4), f"o{other}"), [], 0.0
        )
    old = run_call(policy, arrival("a", prompt(1, 4) + prompt(2, 16), "s"), [], 0.0)
    before = len(policy.residency.ledger)
    policy.on_arrival(arrival("b", old[: 10 * BLOCK] + prompt(3, 2), "s"), 0.1)
    assert len(policy.residency.ledger) == before - 10 + 2
    check_integrity(policy)


def test_a_side_call_leaves_the_main_context_alone():
    policy = make_policy(pool_blocks=1000)
    main = run_call(policy, arrival("a", prompt(1, 16), "s"), [], 0.0)
    run_call(policy, arrival("title", prompt(2, 3), "s"), [], 0.0)
    context = policy.table.sessions["", "s"].contexts[0]
    policy.on_arrival(arrival("b", [*main, 1, 2, 3], "s"), 0.1)
    assert policy.calls["b"].context is context
    assert len(policy.table.sessions["", "s"].contexts) == 2


def test_an_explicit_end_frees_everything():
    policy = make_policy(pool_blocks=1000)
    run_call(policy, arrival("a", prompt(1, 16), "s"), [], 0.0)
    context = policy.table.sessions["", "s"].contexts[0]
    run_call(policy, arrival("b", prompt(1, 17), "s", last=True), [], 0.1)
    assert context.dead
    state = policy.state()
    assert state["sessions"] == state["idle"] == state["ledger_blocks"] == state["lineage"] == 0


def test_idle_sessions_are_forgotten_in_time_and_in_number():
    policy = make_policy(pool_blocks=100_000, session_idle_s=10.0, max_sessions=5)
    for index in range(20):
        run_call(policy, arrival(f"c{index}", prompt(index, 2), f"s{index}"), [], 0.0)
    policy.on_step(0.1)
    assert policy.state()["sessions"] == 5
    policy.on_step(11.0)
    state = policy.state()
    assert state["sessions"] == state["lineage"] == state["ledger_blocks"] == 0


class World:
    """Random agents against the policy, with the engine's part played by the test."""

    def __init__(self, policy, rng):
        self.policy, self.rng, self.now = policy, rng, 0.0
        self.contexts: dict[str, list[int]] = {}
        self.live: dict[str, tuple[str, list[int], list[int]]] = {}
        self.count = 0

    def arrive(self):
        session = f"s{self.rng.randrange(6)}"
        tokens = self.contexts.get(session, [7] * 8)
        kind = self.rng.random()
        if kind < 0.15:
            tokens = tokens[: self.rng.randrange(len(tokens) + 1)]
        tokens = [*tokens, *(self.rng.randrange(50) for _ in range(self.rng.randrange(1, 20)))]
        self.count += 1
        call = arrival(
            f"c{self.count}",
            tokens,
            session if kind < 0.8 else None,
            last=kind > 0.5 and kind < 0.55,
            parent_id="s0" if kind < 0.2 else None,
        )
        self.policy.on_arrival(call, self.now)
        self.live[call.call_id] = (session, tokens, call.chain)

    def finish(self):
        if self.live:
            call_id = self.rng.choice(list(self.live))
            aborted = self.policy.is_held(call_id)
            session, tokens, chain = self.live.pop(call_id)
            if not aborted:
                tokens = [*tokens, *(self.rng.randrange(50) for _ in range(6))]
                chain.extend(chain_of(tokens)[len(chain) :])
                self.contexts[session] = tokens
            self.policy.on_finish(call_id, len(tokens), self.now)

    def step(self):
        self.now += self.rng.choice([0.001, 0.1, 1.0, 30.0])
        for call_id in self.policy.on_step(self.now):
            assert not self.policy.is_held(call_id)


@settings(max_examples=150)
@given(st.integers(0), st.integers(1, 60), st.sampled_from([0.5, 1e9]))
def test_books_balance_and_every_hold_ends(seed, pool, max_hold):
    rng = random.Random(seed)
    policy = make_policy(pool_blocks=pool, max_hold_s=max_hold, session_idle_s=100.0)
    world = World(policy, rng)
    for _ in range(80):
        rng.choice([world.arrive, world.arrive, world.finish, world.finish, world.step])()
        check_integrity(policy)
    for _ in range(2000):
        if not world.live:
            break
        for call_id in [c for c in world.live if not policy.is_held(c)]:
            tokens = world.live.pop(call_id)[1]
            policy.on_finish(call_id, len(tokens), world.now)
        world.now += 0.05
        policy.on_step(world.now)
        check_integrity(policy)
    assert not world.live, "a hold never ended"
    policy.on_step(world.now + 1e6)
    state = policy.state()
    assert state["sessions"] == state["lineage"] == state["ledger_blocks"] == state["calls"] == 0
    assert state["used_blocks"] == 0


def slow_tools(**knobs):
    """A policy whose agents have gaps of a minute, on an engine that prefills 10,000 tokens/s."""
    policy = make_policy(pool_blocks=100, headroom=0.0, **{"patience": 0.2, **knobs})
    for _ in range(200):
        policy.classes.get(("", None)).gaps.observe_return(60.0)
        policy.cost.observe(Step(1, 100, 100), 0.01, 0.01)
    return policy


def held_by_an_idle_resident(policy, at=1.0):
    run_call(policy, arrival("a", prompt(1, 70), "s1"), [], 0.0)
    policy.on_arrival(arrival("b", prompt(2, 70), "s2"), at)
    return policy.on_step(at)


def test_who_is_away_for_long_gives_way_to_who_waits():
    policy = slow_tools()
    assert held_by_an_idle_resident(policy) == ["b"]
    assert policy.state()["gave_way"] == 1
    # Its next call waits until the other is away in its turn.
    policy.on_arrival(arrival("a2", [*prompt(1, 70), 1, 2], "s1", last=True), 60.0)
    assert policy.is_held("a2")
    policy.on_finish("b", 70 * BLOCK, 61.0)
    assert policy.on_step(61.0) == ["a2"]
    check_integrity(policy)


def test_with_all_patience_nobody_gives_way():
    policy = slow_tools(patience=1.0)
    assert held_by_an_idle_resident(policy) == []


def test_nobody_gives_way_in_vain():
    policy = slow_tools()
    run_call(policy, arrival("a", prompt(1, 30), "s1"), [], 0.0)
    policy.on_arrival(arrival("b", prompt(2, 60), "s2"), 0.5)
    policy.on_arrival(arrival("c", prompt(3, 80), "s3"), 1.0)
    # Even without the first, the third would not fit beside the second.
    assert policy.on_step(1.0) == []
    assert policy.state()["gave_way"] == 0
    check_integrity(policy)


def test_nobody_gives_way_while_nobody_waits():
    policy = slow_tools()
    run_call(policy, arrival("a", prompt(1, 70), "s1"), [], 0.0)
    for second in range(1, 50):
        assert policy.on_step(float(second)) == []
    assert len(policy.residency.residents) == 1


def test_before_steps_were_timed_nobody_gives_way():
    policy = make_policy(pool_blocks=100, patience=0.0, headroom=0.0)
    assert held_by_an_idle_resident(policy) == []


def test_small_workflows_enter_before_large_ones_unless_those_waited_long():
    def order(**knobs):
        policy = make_policy(pool_blocks=100, patience=0.0, headroom=0.0, **knobs)
        policy.on_arrival(arrival("a", prompt(1, 95), "s1", last=True), 1.0)
        policy.on_arrival(arrival("large", prompt(2, 90), "s2", last=True), 2.0)
        policy.on_arrival(arrival("small", prompt(3, 10), "s3", last=True), 3.0)
        policy.on_finish("a", 95 * BLOCK, 4.0)
        return policy.on_step(4.0)

    assert order(short_first=0.0) == ["large"]
    assert order(short_first=10.0) == ["small"]


def test_who_is_overdue_in_a_full_pool_runs_one_call_and_displaces_nobody():
    policy = make_policy(pool_blocks=100, patience=0.0, headroom=0.0, max_hold_s=10.0)
    policy.on_arrival(arrival("a", prompt(1, 90), "s1"), 0.0)
    policy.on_arrival(arrival("b", prompt(2, 50), "s2"), 1.0)
    assert policy.on_step(10.9) == [] and policy.is_held("b")
    assert policy.on_step(11.1) == ["b"]
    assert policy.state()["forced"] == 1 and policy.state()["displaced"] == 0
    assert len(policy.residency.residents) == 1
    check_integrity(policy)
    policy.on_finish("b", 50 * BLOCK, 12.0)
    assert policy.residency.loose_blocks == 0
    # It still has no place: its next call waits like the first.
    policy.on_arrival(arrival("b2", [*prompt(2, 50), 1], "s2"), 13.0)
    assert policy.is_held("b2")
    policy.on_finish("a", 90 * BLOCK, 14.0)
    check_integrity(policy)


def overdrawn(overdraft: float):
    """A pool of 100 blocks, of which five are computed in the time of a cycle."""
    policy = make_policy(pool_blocks=100, patience=0.0, headroom=0.0, overdraft=overdraft)
    token_s = policy.classes.everyone.cycle_s / (5 * BLOCK)
    for tokens in (100, 200) * 100:
        policy.cost.observe(Step(tokens, 0, 0, 1), tokens * token_s, 1000.0)
    policy.cost.spare = 1.0
    policy.on_arrival(arrival("a", prompt(1, 60), "s1"), 0.0)
    return policy


def test_a_little_too_much_is_no_reason_to_wait():
    for overdraft, blocks, held in ((0.0, 40, True), (2.0, 40, False), (2.0, 60, True)):
        policy = overdrawn(overdraft)
        policy.on_arrival(arrival("b", prompt(2, blocks), "s2"), 0.0)
        assert policy.is_held("b") is held
        policy.on_finish("a", 60 * BLOCK, 0.1)
        policy.on_arrival(arrival("a2", [*prompt(1, 60), 1], "s1"), 0.2)
        # Who is in keeps its place.
        assert not policy.is_held("a2")
        check_integrity(policy)
