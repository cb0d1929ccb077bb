"""WorkflowQueue against vLLM's own queues, operation by operation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

from vllm_saga.engine.queue import WorkflowQueue
from vllm_saga.simulator.driver import make_request

OPERATIONS = (
    "add",
    "add",
    "add",
    "pop",
    "peek",
    "prepend",
    "prepend_many",
    "remove",
    "remove_many",
)


def both(policy):
    return create_request_queue(policy), WorkflowQueue(policy, lambda request: False)


def fresh(rng, number):
    return make_request(
        f"r{number}", [1, 2], 1, priority=rng.randrange(3), arrival_time=float(rng.randrange(5))
    )


@settings(max_examples=80)
@given(st.sampled_from(SchedulingPolicy), st.integers(0))
def test_order_is_stock_s_when_nothing_is_held(policy, seed):
    rng = random.Random(seed)
    stock, ours = both(policy)
    out: list = []
    for number in range(60):
        operation = rng.choice(OPERATIONS)
        members = list(stock)
        if operation == "add":
            request = fresh(rng, number)
            stock.add_request(request)
            ours.add_request(request)
        elif operation in ("pop", "peek") and members:
            method = f"{operation}_request"
            request = getattr(stock, method)()
            assert getattr(ours, method)() is request
            if operation == "pop":
                out.append(request)
        elif operation == "prepend" and out:
            request = out.pop()
            stock.prepend_request(request)
            ours.prepend_request(request)
        elif operation == "prepend_many" and out:
            back, out = out, []
            stock.prepend_requests(back)
            ours.prepend_requests(back)
        elif operation == "remove" and members:
            request = rng.choice(members)
            stock.remove_request(request)
            ours.remove_request(request)
        elif operation == "remove_many":
            chosen = rng.sample(members, len(members) // 2) + out[:1]
            stock.remove_requests(chosen)
            ours.remove_requests(chosen)
        assert [r.request_id for r in ours] == [r.request_id for r in stock]
        assert len(ours) == len(stock) and bool(ours) == bool(stock)


@pytest.mark.parametrize("policy", SchedulingPolicy)
def test_errors_are_stock_s(policy):
    stock, ours = both(policy)
    stranger = make_request("x", [1], 1)
    for queue in (stock, ours):
        for method in (queue.peek_request, queue.pop_request):
            with pytest.raises(IndexError):
                method()
        with pytest.raises(ValueError):
            queue.remove_request(stranger)
        queue.remove_requests([stranger])


def test_a_held_call_is_counted_but_not_seen_and_keeps_its_place():
    held = {"r1", "r3"}
    queue = WorkflowQueue(SchedulingPolicy.FCFS, lambda request: request.request_id in held)
    for number in range(5):
        queue.add_request(make_request(f"r{number}", [1], 1))
    assert len(queue) == 5
    assert [r.request_id for r in queue] == ["r0", "r2", "r4", "r1", "r3"]
    queue.release(["r1", "unknown"])
    assert [queue.pop_request().request_id for _ in range(4)] == ["r0", "r1", "r2", "r4"]
    assert len(queue) == 1 and not queue
    with pytest.raises(IndexError):
        queue.peek_request()
    queue.release_all()
    assert queue.pop_request().request_id == "r3"


def test_a_held_call_can_be_removed():
    queue = WorkflowQueue(SchedulingPolicy.FCFS, lambda request: True)
    request = make_request("r", [1], 1)
    queue.add_request(request)
    queue.remove_request(request)
    queue.release(["r"])
    assert len(queue) == 0


def test_what_the_scheduler_puts_back_is_never_held():
    queue = WorkflowQueue(SchedulingPolicy.FCFS, lambda request: True)
    queue.prepend_request(make_request("preempted", [1], 1))
    assert queue.peek_request().request_id == "preempted"


def test_removed_entries_do_not_pile_up():
    queue = WorkflowQueue(SchedulingPolicy.FCFS, lambda request: False)
    keep = make_request("keep", [1], 1)
    queue.add_request(keep)
    for number in range(5000):
        request = make_request(f"r{number}", [1], 1)
        queue.add_request(request)
        queue.remove_request(request)
    assert len(queue._heap) < 200
    assert list(queue) == [keep]


def test_random_holds_lose_nothing():
    rng = random.Random(3)
    held: set[str] = set()
    queue = WorkflowQueue(SchedulingPolicy.FCFS, lambda request: request.request_id in held)
    added, popped = set(), set()
    for number in range(2000):
        request_id = f"r{number}"
        if rng.random() < 0.5:
            held.add(request_id)
        queue.add_request(make_request(request_id, [1], 1))
        added.add(request_id)
        if held and rng.random() < 0.4:
            queue.release([held.pop()])
        if queue and rng.random() < 0.5:
            popped.add(queue.pop_request().request_id)
    queue.release_all()
    while queue:
        popped.add(queue.pop_request().request_id)
    assert popped == added
