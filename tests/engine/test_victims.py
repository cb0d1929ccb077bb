"""Who is preempted when a running call needs a block and none is free."""

from __future__ import annotations

import pytest

from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler


class Squeezed:
    """Three calls of three sessions that grow, on a pool without a free block."""

    def __init__(self, overlapping: bool, session_ids: bool = True) -> None:
        self.scheduler = make_scheduler("saga", blocks=100, overlapping=overlapping)
        self.driver = Driver(self.scheduler)
        for number, name in enumerate(("a", "b", "c")):
            session = name if session_ids else None
            prompt = [7 + number] * (40 + number)
            self.driver.add(make_request(name, prompt, 60, session_id=session))
        for _ in range(3):
            self.step()
        assert len(self.scheduler.running) == 3
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.taken = self.pool.get_new_blocks(self.pool.get_num_free_blocks())
        self.preempted: list[str] = []
        upstream = self.scheduler._preempt_request

        def noting(request, *args, **kwargs):
            self.preempted.append(request.request_id)
            return upstream(request, *args, **kwargs)

        self.scheduler._preempt_request = noting

    def step(self) -> None:
        self.driver.step()
        self.driver.now += 0.02

    def until_preempted(self) -> str:
        for _ in range(20):
            self.step()
            if self.preempted:
                return self.preempted[0]
        raise AssertionError("nobody was preempted")

    def finish(self) -> None:
        self.pool.free_blocks(self.taken)
        self.driver.drain(2_000, dt=0.02)
        assert len(self.driver.finished) == 3


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("least_wanted", ["a", "b", "c"])
def test_the_least_wanted_is_preempted_wherever_it_runs(least_wanted, overlapping, monkeypatch):
    squeezed = Squeezed(overlapping)
    saga = squeezed.scheduler.saga
    monkeypatch.setattr(saga, "running_rank", lambda request_id: (request_id == least_wanted,))
    assert squeezed.until_preempted() == least_wanted
    squeezed.finish()
    assert squeezed.scheduler.saga is saga


@pytest.mark.parametrize("session_ids", [False, True])
def test_of_equals_the_one_that_came_last_is_preempted_as_stock_does(session_ids, monkeypatch):
    squeezed = Squeezed(overlapping=False, session_ids=session_ids)
    monkeypatch.setattr(squeezed.scheduler.saga, "running_rank", lambda request_id: (0,))
    assert squeezed.until_preempted() == "c"
    squeezed.finish()


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_fault_in_the_choice_leaves_it_to_stock(overlapping, monkeypatch):
    squeezed = Squeezed(overlapping)
    monkeypatch.setattr(squeezed.scheduler.saga, "running_rank", lambda request_id: 1 / 0)
    assert squeezed.until_preempted() == "c"
    squeezed.finish()
    assert squeezed.scheduler.saga is None and squeezed.scheduler.saga_failures == 1
