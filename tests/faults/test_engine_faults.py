"""Invariant 4: whatever fails in the policy, the engine goes on as stock, and loses nothing."""

from __future__ import annotations

import json
import logging
from operator import attrgetter
from typing import Any

import pytest
from under_pressure import BLOCKS, Fault, Faulty, errors_logged, play, stock_outputs

from vllm_saga.engine import memory
from vllm_saga.engine import scheduler as adapter
from vllm_saga.engine import tools as tool_reader
from vllm_saga.policy.explain import Explainer
from vllm_saga.simulator.schedulers import make_scheduler

# What the engine asks of the policy, and of what it brings along, as attributes of the scheduler.
PLACES = [
    "saga.on_arrival", "saga.on_finish", "saga.on_scheduled", "saga.on_step", "saga.is_held",
    "saga.owner", "saga.keep_ranks", "saga.rank_epoch", "saga.state", "saga.paces",
    "saga.cost.observe", "saga.residency.next_to_enter", "saga.retention.ranks",
    "saga.timeline.add_call", "saga.share.charge", "_timer.scheduled", "_timer.finished",
    "_tool_reader.names", "_graph_file.maybe_save", "_free_queue.claim",
]  # fmt: skip
# (call that fails, whether it has done its work by then, the scheduler overlaps)
WHEN = [(1, False, False), (1, True, True), (6, False, True), (6, True, False)]


def busy_scheduler(overlapping: bool, tmp_path: Any) -> Any:
    knobs = {"log_interval_s": 0.04, "graph_path": str(tmp_path / "g.json"), "graph_save_s": 0.1}
    return make_scheduler("saga", blocks=BLOCKS, overlapping=overlapping, saga=knobs)


def check_fell_back(scheduler: Any, driver: Any, records: list[logging.LogRecord]) -> None:
    """Everything was served, as stock serves it; one fault was told, once."""
    overlapping = isinstance(scheduler, adapter.SagaAsyncScheduler)
    assert driver.outputs == stock_outputs(overlapping)
    assert not scheduler.requests and not len(scheduler.waiting)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1
    assert scheduler.saga is None and scheduler.saga_failures == 1
    assert [record.exc_info[0] for record in records if record.exc_info] == [Fault]
    assert "Please report this" in records[0].getMessage() and len(records) == 1


@pytest.mark.parametrize("nth, late, overlapping", WHEN)
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_anywhere_leaves_the_engine_serving(
    place, nth, late, overlapping, tmp_path, monkeypatch
):
    owner, _, name = place.rpartition(".")
    scheduler = busy_scheduler(overlapping, tmp_path)
    faulty = None

    def inject(busy: Any) -> None:
        nonlocal faulty
        assert busy.saga.residency.held_calls, "nothing held: the fault would be idle"
        found = attrgetter(owner)(busy)
        faulty = Faulty(getattr(found, name), nth, late)
        monkeypatch.setattr(found, name, faulty)

    with errors_logged(adapter.logger) as records:
        driver = play(scheduler, inject)
    assert faulty is not None and faulty.count == nth
    check_fell_back(scheduler, driver, records)


@pytest.mark.parametrize("nth, late, overlapping", WHEN)
def test_a_fault_in_reading_hints_costs_no_request(nth, late, overlapping, tmp_path, monkeypatch):
    scheduler = busy_scheduler(overlapping, tmp_path)
    with errors_logged(adapter.logger) as records:
        driver = play(
            scheduler,
            lambda _: monkeypatch.setattr(
                adapter, "read_arrival", Faulty(adapter.read_arrival, nth, late)
            ),
        )
    check_fell_back(scheduler, driver, records)


@pytest.mark.parametrize("answer", [[], [1.0], None, 5])
def test_an_answer_that_is_none_is_a_fault_like_others(answer, tmp_path, monkeypatch):
    """Of `keep_ranks`, which is asked in the middle of an eviction."""
    scheduler = busy_scheduler(False, tmp_path)
    with errors_logged(adapter.logger) as records:
        driver = play(
            scheduler, lambda s: monkeypatch.setattr(s.saga, "keep_ranks", lambda *args: answer)
        )
    assert driver.outputs == stock_outputs(False)
    assert scheduler.saga is None and scheduler.saga_failures == len(records) == 1


def test_a_step_s_answer_that_is_none_is_a_fault_like_others(tmp_path, monkeypatch):
    scheduler = busy_scheduler(False, tmp_path)
    with errors_logged(adapter.logger) as records:
        driver = play(scheduler, lambda s: monkeypatch.setattr(s.saga, "on_step", lambda now: 5))
    assert driver.outputs == stock_outputs(False)
    assert scheduler.saga is None and scheduler.saga_failures == len(records) == 1


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_fault_in_a_reset_leaves_the_cache_reset(overlapping, tmp_path, monkeypatch):
    scheduler = busy_scheduler(overlapping, tmp_path)
    monkeypatch.setattr(scheduler.saga, "reset", Faulty(scheduler.saga.reset, 1))
    with errors_logged(adapter.logger) as records:
        assert scheduler.reset_prefix_cache()
        driver = play(scheduler)
    check_fell_back(scheduler, driver, records)


# -- what is beside the policy: it ends alone (traces: tests/engine/test_traces.py) ------------


def test_a_fault_in_statistics_ends_them_and_nothing_else(tmp_path, monkeypatch):
    scheduler = busy_scheduler(False, tmp_path)
    if scheduler._reporter is None:
        pytest.skip("our stat logger is not installed")
    faulty = Faulty(scheduler._reporter.make, 2)
    monkeypatch.setattr(scheduler._reporter, "make", faulty)
    with errors_logged(adapter.logger) as records:
        driver = play(scheduler)
    assert driver.outputs == stock_outputs(False)
    assert faulty.count == 2 and scheduler._reporter is None
    assert scheduler.saga is not None and scheduler.saga_failures == 0
    assert ["no metrics from here on" in record.getMessage() for record in records] == [True]


def test_a_fault_in_reading_tools_leaves_them_unknown(tmp_path, monkeypatch):
    scheduler = busy_scheduler(False, tmp_path)
    monkeypatch.setattr(scheduler._tool_reader, "_load", Faulty(lambda: None, 1))
    with errors_logged(adapter.logger, tool_reader.logger) as records:
        driver = play(scheduler)
    assert driver.outputs == stock_outputs(False)
    assert scheduler.saga is not None and scheduler.saga_failures == 0
    assert ["tools stay unknown" in record.getMessage() for record in records] == [True]


def test_a_fault_in_explaining_ends_the_question_only(tmp_path, monkeypatch):
    scheduler = busy_scheduler(False, tmp_path)
    monkeypatch.setattr(Explainer, "workflows", Faulty(Explainer.workflows, 1))

    def ask(busy: Any) -> None:
        with pytest.raises(Fault):
            busy.saga_control("workflows", {})
        assert busy.saga_control("state", {})["saga"]

    driver = play(scheduler, ask)
    assert driver.outputs == stock_outputs(False)
    assert scheduler.saga is not None and scheduler.saga_failures == 0


@pytest.mark.parametrize("fails", ["decode", "restore"])
def test_a_graph_file_that_cannot_be_taken_over_is_put_aside(fails, tmp_path, monkeypatch):
    play(busy_scheduler(False, tmp_path)).scheduler.shutdown()
    file = tmp_path / "g.json"
    assert json.loads(file.read_bytes())["agents"]
    monkeypatch.setattr(memory, fails, Faulty(getattr(memory, fails), 1))
    with errors_logged(adapter.logger, memory.logger) as records:
        scheduler = busy_scheduler(False, tmp_path)
    assert [record.exc_info[0] for record in records if record.exc_info] == [Fault]
    assert not file.exists() and (tmp_path / "g.json.bad").exists()
    assert len(scheduler.saga.classes) == 0
    assert play(scheduler).outputs == stock_outputs(False)
    assert scheduler.saga is not None


def test_a_fault_in_the_last_save_does_not_keep_the_engine_from_its_end(tmp_path, monkeypatch):
    scheduler = busy_scheduler(False, tmp_path)
    play(scheduler)
    monkeypatch.setattr(memory, "snapshot", Faulty(memory.snapshot, 1))
    with errors_logged(adapter.logger) as records:
        scheduler.shutdown()
    assert len(records) == 1 and scheduler.saga_failures == 1
