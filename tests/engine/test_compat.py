"""The contract with vLLM, and what `--scheduler-cls` makes of our names."""

from __future__ import annotations

import json

import pytest
from vllm.config.scheduler import SchedulerConfig
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.scheduler import Scheduler

import vllm_saga
from vllm_saga import plugin
from vllm_saga.config import ConfigError, SagaConfig, load_config
from vllm_saga.engine import compat
from vllm_saga.engine.scheduler import SagaAsyncScheduler, SagaSyncScheduler
from vllm_saga.simulator.schedulers import make_scheduler


def test_this_vllm_fits():
    compat.check_classes()


def test_a_missing_method_is_named(monkeypatch):
    monkeypatch.delattr(FreeKVCacheBlockQueue, "popleft_n")
    with pytest.raises(compat.UnsupportedVllmError, match=r"FreeKVCacheBlockQueue\.popleft_n\(\)"):
        compat.check_classes()


def test_a_changed_signature_is_named(monkeypatch):
    monkeypatch.setattr(Scheduler, "add_request", lambda self, call: None)
    with pytest.raises(compat.UnsupportedVllmError, match=r"add_request\(request\), found \(call"):
        compat.check_classes()


def test_a_missing_attribute_is_named_before_anything_is_swapped(monkeypatch):
    scheduler = make_scheduler("stock")
    del scheduler.hash_block_size
    with pytest.raises(compat.UnsupportedVllmError, match="hash_block_size of type int"):
        compat.check_instance(scheduler)


@pytest.mark.parametrize("name", ["policy", "cache_config"])
def test_an_attribute_of_any_type_is_missed_too(name):
    scheduler = make_scheduler("stock")
    delattr(scheduler, name)
    with pytest.raises(compat.UnsupportedVllmError, match=rf"Scheduler\.{name} of type object"):
        compat.check_instance(scheduler)


@pytest.fixture
def unpatched(monkeypatch):
    method = SchedulerConfig.get_scheduler_cls
    monkeypatch.setattr(
        SchedulerConfig, "get_scheduler_cls", getattr(method, "__wrapped__", method)
    )


def test_installing_changes_nothing_but_the_name_saga(unpatched):
    before = SchedulerConfig.default_factory().get_scheduler_cls()
    plugin.register()
    plugin.register()
    assert SchedulerConfig.default_factory().get_scheduler_cls() is before
    config = SchedulerConfig.default_factory(scheduler_cls="saga")
    assert config.get_scheduler_cls() is vllm_saga.SagaScheduler
    config = SchedulerConfig.default_factory(scheduler_cls="vllm_saga.SagaScheduler")
    assert config.get_scheduler_cls() is vllm_saga.SagaScheduler


@pytest.mark.parametrize(
    "overlapping, cls", [(False, SagaSyncScheduler), (True, SagaAsyncScheduler)]
)
def test_the_scheduler_follows_async_scheduling(overlapping, cls):
    made = make_scheduler("saga", overlapping=overlapping)
    stock = make_scheduler("stock", overlapping=overlapping)
    again = vllm_saga.SagaScheduler(
        vllm_config=stock.vllm_config,
        kv_cache_config=stock.kv_cache_config,
        structured_output_manager=stock.structured_output_manager,
        block_size=stock.block_size,
    )
    assert type(made) is type(again) is cls


def test_settings_from_file_and_from_the_command_line(tmp_path):
    for name, text in (
        ("a.json", json.dumps({"headroom": 0.1, "max_hold_s": 5})),
        ("a.yaml", "headroom: 0.1\nmax_hold_s: 5\n"),
    ):
        path = tmp_path / name
        path.write_text(text)
        config = load_config({"saga": {"max_hold_s": 7}}, {"SAGA_CONFIG": str(path)})
        assert config == SagaConfig(headroom=0.1, max_hold_s=7)
    assert load_config(None, {}) == load_config({"other": 1}, {}) == SagaConfig()


@pytest.mark.parametrize(
    "text, named",
    [
        ('{"headroom": 3}', r"headroom = 3: Input should be less than or equal to 0\.5"),
        ('{"max_hold_s": "soon"}', r"max_hold_s = 'soon': Input should be a valid number"),
        ('{"head_room": 0.1}', r"head_room: no such setting; there are: .*headroom"),
        ("[1]", "must hold an object"),
        ("{", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(tmp_path, text, named):
    path = tmp_path / "saga.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_config(None, {"SAGA_CONFIG": str(path)})


def test_a_bad_setting_stops_the_engine_at_start():
    with pytest.raises(ConfigError, match=r"headroom = 0\.9.*0\.5"):
        make_scheduler("saga", saga={"headroom": 0.9})
