"""On a vLLM with patches/ its hooks are what we use. Run by test_series.py, on a patched copy."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace

import pytest
import vllm
import vllm.plugins
from test_stats import run_under_pressure
from test_victims import Squeezed
from vllm.config.scheduler import SchedulerConfig
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import DPLBAsyncMPClient

import vllm_saga
from vllm_saga import plugin
from vllm_saga.engine import compat, control, stats
from vllm_saga.engine.blocks import RetentionQueue
from vllm_saga.engine.queue import WorkflowQueue
from vllm_saga.engine.scheduler import SagaMixin
from vllm_saga.simulator.schedulers import make_scheduler


def test_this_is_the_patched_copy_and_has_every_hook():
    assert vllm.__file__.startswith(os.environ["PATCHED_VLLM"])
    assert len(compat.HOOKS) == 4


def test_the_queues_are_there_when_vllm_s_constructor_is_done(monkeypatch):
    monkeypatch.setattr(SagaMixin, "_install", lambda self, config: None)
    scheduler = make_scheduler("saga")
    assert type(scheduler.waiting) is WorkflowQueue
    assert type(scheduler.kv_cache_manager.block_pool.free_block_queue) is RetentionQueue


def test_they_are_the_ones_that_the_policy_works_with():
    scheduler = make_scheduler("saga")
    assert scheduler._held_queue is scheduler.waiting
    assert scheduler._free_queue is scheduler.kv_cache_manager.block_pool.free_block_queue


def test_with_retention_left_to_stock_the_free_queue_is_stock_s():
    pool = make_scheduler("saga", saga={"retention": "stock"}).kv_cache_manager.block_pool
    assert not isinstance(pool.free_block_queue, RetentionQueue)


def test_a_victim_is_chosen_without_sorting_the_running_calls(monkeypatch):
    monkeypatch.setattr(SagaMixin, "_sort_victims", lambda self, saga: 1 / 0)
    squeezed = Squeezed(overlapping=False)
    rank = {"a": 2, "b": 3, "c": 1}
    monkeypatch.setattr(squeezed.scheduler.saga, "running_rank", lambda name: (rank[name],))
    assert squeezed.until_preempted() == "b"
    assert [call.request_id for call in squeezed.scheduler.running] == ["a", "c"]
    squeezed.finish()


def test_every_call_is_told_finished_once(monkeypatch):
    told: list[str] = []
    ours = SagaMixin.on_request_finished

    def noting(self, request):
        told.append(request.request_id)
        ours(self, request)

    monkeypatch.setattr(SagaMixin, "on_request_finished", noting)
    driver = run_under_pressure(make_scheduler("saga", blocks=60))
    assert sorted(told) == sorted(set(told)) and len(told) == len(driver.finished) > 20


def test_reports_have_a_field_of_their_own():
    scheduler = make_scheduler("saga", blocks=60)
    run_under_pressure(scheduler)
    scheduler._reporter = stats.Reporter()
    made = scheduler.make_stats()
    assert list(made.custom_stats) == [stats.LOGGER] and made.waiting_lora_adapters == {}
    assert stats.take(made) is not None and stats.take(made) is None


def test_messages_come_by_scheduler_rpc_and_nothing_is_added_to_the_core():
    control.install()
    assert not hasattr(EngineCore, control.METHOD)
    ranks = {}
    for rank in range(2):
        core = object.__new__(EngineCore)
        core.scheduler = make_scheduler("saga")
        ranks[bytes([rank, 0])] = core
    client = object.__new__(DPLBAsyncMPClient)
    client.core_engines = list(ranks)

    async def call(method, *args, engine):
        return getattr(ranks[engine], method)(*args)

    client._call_utility_async = call
    told = asyncio.run(control.ask(llm_with(client), control.STATE, {}))
    assert [state["started"] for state in told] == [c.scheduler.started for c in ranks.values()]


def test_a_server_without_saga_says_so():
    core = object.__new__(EngineCore)
    core.scheduler = make_scheduler("stock")
    client = SimpleNamespace()

    async def call(method, *args):
        return [getattr(core, method)(*args)]

    client.call_utility_all_async = call
    with pytest.raises(control.ControlError, match="without --scheduler-cls saga"):
        asyncio.run(control.ask(llm_with(client), control.STATE, {}))


def llm_with(client) -> SimpleNamespace:
    """`AsyncLLM` as far as it passes calls on."""
    llm = SimpleNamespace(engine_core=client)
    llm.scheduler_rpc = AsyncLLM.scheduler_rpc.__get__(llm)
    return llm


def test_the_name_comes_from_the_entry_point_and_nothing_is_wrapped():
    before = SchedulerConfig.get_scheduler_cls
    plugin.register()
    assert SchedulerConfig.get_scheduler_cls is before
    config = SchedulerConfig.default_factory(scheduler_cls="saga")
    assert config.scheduler_cls == "vllm_saga.SagaScheduler"
    assert config.get_scheduler_cls() is vllm_saga.SagaScheduler
    with pytest.raises(ValueError, match=r"'sage'.*'saga'"):
        SchedulerConfig.default_factory(scheduler_cls="sage")
