"""Invariants 2, 3 and 5: everything drains whatever happens, nothing is pinned, nothing leaks."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st
from vllm.v1.core.sched.interface import PauseState

from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import BLOCK_SIZE, make_scheduler

MAX_CONTEXT = 20 * BLOCK_SIZE


class Chaos:
    """Random agents on a real scheduler: sessions, plain calls, aborts, stops, resets, pauses."""

    def __init__(self, driver, rng):
        self.driver, self.rng = driver, rng
        self.contexts: dict[str, list[int]] = {}
        self.number = 0

    def arrive(self):
        rng = self.rng
        session = f"s{rng.randrange(8)}"
        tokens = self.contexts.get(session, [3] * 40)
        if rng.random() < 0.2:
            tokens = tokens[: rng.randrange(1, len(tokens) + 1)]
        tokens = [*tokens, *(rng.randrange(40) for _ in range(rng.randrange(1, 60)))]
        output = rng.randrange(1, 30)
        if len(tokens) + output > MAX_CONTEXT:
            tokens = tokens[-40:]
        self.number += 1
        extra = {}
        if rng.random() < 0.1:
            extra["saga_last"] = 1
        if rng.random() < 0.2:
            extra["saga_parent"] = "s0"
        if rng.random() < 0.3:
            extra["saga_tenant"] = f"t{rng.randrange(3)}"
        if rng.random() < 0.3:
            extra["agent_hint"] = json.dumps(
                {
                    "next_tool": rng.choice(["a", "b", ["a", "b"], ""]),
                    "expected_gap_s": rng.choice([0.0, 0.5, 1e9, "x"]),
                    "steps_left": rng.choice([0, 3, -1]),
                    "deadline_s": rng.choice([1.0, 100.0, None]),
                    "cache_control": {"ttl": rng.choice(["5m", 1, -3])},
                }
            )
        request = make_request(
            f"r{self.number}",
            tokens,
            output,
            session_id=session if rng.random() < 0.7 else None,
            priority=rng.randrange(2),
            arrival_time=self.driver.now,
            stop_token_ids=[60, 61] if rng.random() < 0.5 else None,
            **extra,
        )
        self.driver.add(request)
        self.contexts[session] = tokens

    def abort(self):
        live = list(self.driver.scheduler.requests)
        if live:
            self.driver.abort(self.rng.choice(live))

    def reset(self):
        self.driver.scheduler.reset_prefix_cache(reset_running_requests=self.rng.random() < 0.5)

    def pause(self):
        self.driver.scheduler.set_pause_state(
            self.rng.choice([PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
        )

    def resume(self):
        self.driver.scheduler.set_pause_state(PauseState.UNPAUSED)

    def step(self):
        self.driver.step()
        self.driver.now += self.rng.choice([0.01, 0.01, 0.5, 20.0])


def check_no_pins(scheduler):
    """Blocks not used by a live request are free, retained or not (invariant 2)."""
    pool = scheduler.kv_cache_manager.block_pool
    used = {
        block.block_id
        for request_id in scheduler.requests
        for group in scheduler.kv_cache_manager.get_blocks(request_id).blocks
        for block in group
    }
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(used - {0})
    assert all(block.ref_cnt == 0 for block in pool.free_block_queue.get_all_free_blocks())


@how(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0),
    blocks=st.integers(MAX_CONTEXT // BLOCK_SIZE + 2, 120),
    overlapping=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    settings=st.fixed_dictionaries(
        {
            "max_hold_s": st.sampled_from([0.3, 1e6]),
            "retention": st.sampled_from(["value", "wa-lru", "continuum", "lru", "stock"]),
            "patience": st.sampled_from([0.0, 0.5, 1.0]),
            "tenant_source": st.sampled_from(["none", "saga_tenant"]),
            "fair_window_s": st.sampled_from([0.0, 60.0]),
            "slo_factor": st.sampled_from([None, 2.0]),
        }
    ),
)
def test_it_drains(seed, blocks, overlapping, policy, settings):
    scheduler = make_scheduler(
        "saga",
        blocks=blocks,
        overlapping=overlapping,
        policy=policy,
        max_num_batched_tokens=64,
        max_num_seqs=6,
        saga=settings,
    )
    driver = Driver(scheduler)
    rng = random.Random(seed)
    chaos = Chaos(driver, rng)
    weighted = [chaos.arrive] * 4 + [chaos.step] * 8 + [chaos.abort, chaos.reset, chaos.pause]
    for _ in range(60):
        rng.choice([*weighted, chaos.resume, chaos.resume])()
        check_no_pins(scheduler)
    chaos.resume()
    driver.drain(6000, dt=0.02)
    check_no_pins(scheduler)
    assert scheduler.saga is not None, "the policy failed on the way"
    assert len(scheduler.waiting) == 0
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1
    assert scheduler.reset_prefix_cache()
    state = scheduler.saga.state()
    assert state["calls"] == state["held"] == 0


def test_tables_stay_bounded_and_empty_in_the_end():
    scheduler = make_scheduler("saga", blocks=200, saga={"max_sessions": 50, "session_idle_s": 60})
    driver = Driver(scheduler)
    for number in range(600):
        tokens = [number % 500, number // 500, *range(60)]
        driver.add(make_request(f"r{number}", tokens, 3, session_id=f"s{number}"))
        if number % 10 == 0:
            driver.drain(5000, dt=0.05)
    driver.drain(20_000, dt=0.05)
    driver.add(make_request("last", [1, 2, 3], 2))
    driver.drain(100)
    state = scheduler.saga.state()
    assert state["sessions"] <= 51 and state["lineage"] <= 102
    assert len(scheduler.saga._absences) < 600
    driver.now += 1000.0
    driver.add(make_request("later", [4, 5, 6], 2))
    driver.drain(100)
    state = scheduler.saga.state()
    assert state["sessions"] <= 1 and state["lineage"] == state["ledger_blocks"] == 0


def test_a_thousand_calls_of_one_session_at_once():
    scheduler = make_scheduler("saga", blocks=100, max_num_seqs=8)
    driver = Driver(scheduler)
    for number in range(1000):
        driver.add(make_request(f"r{number}", [number % 500, *range(50)], 2, session_id="same"))
    driver.drain(20_000)
    assert len(driver.finished) == 1000
    session = next(iter(scheduler.saga.table.sessions.values()))
    assert len(session.contexts) <= 5


def test_five_hundred_aborts_leave_nothing():
    scheduler = make_scheduler("saga", blocks=60, max_num_seqs=4)
    driver = Driver(scheduler)
    for number in range(500):
        driver.add(make_request(f"r{number}", [number, *range(100)], 5, session_id=f"s{number}"))
    for _ in range(3):
        driver.step()
    for number in range(500):
        driver.abort(f"r{number}")
    driver.drain(100)
    assert scheduler.saga.state()["calls"] == 0
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 59
    driver.now += 1e5
    driver.add(make_request("after", [1], 1))
    driver.drain(50)
    assert scheduler.saga.state()["sessions"] <= 1


def test_a_hand_over_of_kv_is_left_to_stock():
    scheduler = make_scheduler("saga", blocks=60)
    driver = Driver(scheduler)
    transfer = {"do_remote_prefill": True}
    driver.add(make_request("r", [1, 2], 2, session_id="s", kv_transfer_params=transfer))
    assert scheduler.saga.state()["calls"] == 0
    driver.drain(50)


@pytest.mark.parametrize(
    "hints",
    [
        {"saga_last": "maybe"},
        {"saga_last": [1, 2]},
        {"saga_parent": 17},
        {"saga_parent": ["a", "b"]},
        {"session_id": 3.5},
        {"session_id": "x" * 1_000_000},
        {"saga_next_tool": "unknown hints are passed over"},
    ],
)
def test_malformed_hints_never_fail_a_call(hints):
    scheduler = make_scheduler("saga", blocks=60)
    driver = Driver(scheduler)
    driver.add(make_request("r", list(range(30)), 3, **hints))
    driver.drain(50)
    assert driver.finished == ["r"]
    assert scheduler.saga is not None
