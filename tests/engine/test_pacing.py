"""Under pressure a step prefills what it computes for nothing, within vLLM's own limits."""

from __future__ import annotations

import pytest

from vllm_saga.policy.stepfit import Step
from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler

FREE = 64


def know_the_corner(scheduler):
    """A machine on which a step computes `FREE` tokens for nothing."""
    fit = scheduler.saga.cost.fit
    for _ in range(100):
        for new in (1, 10 * FREE, 20 * FREE):
            fit.observe(Step(new, 0, 0), max(new, FREE) * 1e-4)
    fit.solve()
    assert fit.free_tokens == FREE


def engine(overlapping=False, **options):
    scheduler = make_scheduler(
        "saga", blocks=200, overlapping=overlapping, max_num_batched_tokens=1024, **options
    )
    know_the_corner(scheduler)
    return Driver(scheduler)


def decode_and_prefill(driver, prompts=(900,)):
    """Three calls that decode, `prompts` to prefill, and one that is held for lack of room."""
    for number in range(3):
        driver.add(make_request(f"d{number}", [number] * 32, 200, session_id=f"d{number}"))
    for _ in range(6):
        driver.step()
    for number, length in enumerate(prompts):
        driver.add(make_request(f"p{number}", [50 + number] * length, 2, session_id=f"p{number}"))
    add_held(driver)


def add_held(driver):
    driver.add(make_request("held", [99] * 3_100, 2, session_id="held"))
    assert driver.scheduler.saga.is_held("held")


def scheduled(driver, steps):
    return [dict(driver.step().num_scheduled_tokens) for _ in range(steps)]


@pytest.mark.parametrize("overlapping", [False, True])
def test_decodes_go_on_beside_a_prefill_that_fills_the_step(overlapping):
    driver = engine(overlapping)
    decode_and_prefill(driver)
    steps = [step for step in scheduled(driver, 12) if "p0" in step]
    assert all({"d0", "d1", "d2"} <= step.keys() for step in steps)
    assert [sum(step.values()) for step in steps[:10]] == [FREE] * 10


def test_without_pressure_the_step_is_stocks():
    driver = engine()
    decode_and_prefill(driver)
    driver.abort("held")
    assert driver.step().num_scheduled_tokens["p0"] == 900


def test_it_can_be_turned_off():
    driver = engine(saga={"pace_prefills": False})
    decode_and_prefill(driver)
    assert driver.step().num_scheduled_tokens["p0"] == 900


def test_a_prefill_with_nobody_beside_it_goes_at_full_speed():
    driver = engine()
    driver.add(make_request("p", [5] * 900, 2, session_id="p"))
    add_held(driver)
    assert driver.step().num_scheduled_tokens["p"] == 900


def test_a_short_prefill_does_not_wait_for_a_long_one():
    driver = engine()
    decode_and_prefill(driver, prompts=(900, 40))
    first = scheduled(driver, 2)
    assert {"p0", "p1"} <= first[0].keys()
    assert "p1" in driver.finished or driver.outputs["p1"]
    assert len(driver.outputs["p0"]) == 0


def test_the_shortest_of_the_running_prefills_goes_first():
    driver = engine()
    decode_and_prefill(driver, prompts=(900, 500))
    scheduled(driver, 3)
    running = [request.request_id for request in driver.scheduler.running]
    assert running.index("p1") < running.index("p0")


def test_limits_are_as_before_after_a_step_even_one_that_fails(monkeypatch):
    driver = engine()
    scheduler = driver.scheduler
    scheduler.scheduler_config.long_prefill_token_threshold = 20
    before = (scheduler.max_num_scheduled_tokens, 20)
    decode_and_prefill(driver)
    step = driver.step()
    # The operator's limit is the smaller one here.
    assert step.num_scheduled_tokens["p0"] == 20

    def limits():
        config = scheduler.scheduler_config
        return scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold

    assert limits() == before

    def fails():
        raise RuntimeError("no blocks")

    monkeypatch.setattr(scheduler.kv_cache_manager, "new_step_starts", fails)
    with pytest.raises(RuntimeError):
        scheduler.schedule()
    assert limits() == before


def test_a_fault_in_the_pace_leaves_stock(monkeypatch):
    driver = engine()
    decode_and_prefill(driver)

    def fails(*args):
        raise ArithmeticError("pace")

    monkeypatch.setattr(driver.scheduler.saga, "prefill_tokens", fails)
    assert driver.step().num_scheduled_tokens["p0"] == 900
    assert driver.scheduler.saga is None and driver.scheduler.saga_failures == 1
    driver.drain(2_000)
    assert "held" in driver.finished


@pytest.mark.parametrize("overlapping", [False, True])
def test_outputs_are_stocks(overlapping):
    outputs, held = [], False
    for kind in ("stock", "saga"):
        scheduler = make_scheduler(
            kind, blocks=200, overlapping=overlapping, max_num_batched_tokens=1024
        )
        driver = Driver(scheduler)
        if kind == "saga":
            know_the_corner(scheduler)
        for number in range(16):
            tokens = [number] * (37 + 90 * (number % 8))
            driver.add(make_request(f"r{number}", tokens, 20, session_id=f"s{number}"))
            driver.step()
            held |= kind == "saga" and bool(scheduler.saga.residency.held_calls)
        driver.drain(2_000)
        outputs.append(driver.outputs)
    assert held
    assert outputs[0] == outputs[1]
