"""What the fuzzers have found, each as the smallest input that did it."""

from __future__ import annotations

import pytest

from vllm_saga.config import CONFIG_VARIABLE, ConfigError, load_config
from vllm_saga.policy.clients import Rules, identify
from vllm_saga.policy.messages import MessageLineage
from vllm_saga.router.backends import Address, AddressError, Backends, BackendsFile
from vllm_saga.router.health import Health
from vllm_saga.router.placement import make_placer
from vllm_saga.router.reports import ReportError, parse_metrics, parse_state
from vllm_saga.simulator import formats, load, presets
from vllm_saga.simulator.hardware import HardwareError
from vllm_saga.simulator.trace import TraceError

DEEP = b"[" * 100_000
ALIASES = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)


@pytest.mark.parametrize(
    "name, data",
    [
        ("c.json", DEEP), ("c.yaml", DEEP), ("c.yaml", b"!!int ''"), ("c.yaml", b"!!bool x"),
        ("c.yaml", b"!!timestamp x"), ("c.yaml", b"max_hold_s: .inf"), ("c.yaml", b"\xff"),
        ("c.yaml", b"fair_window_s: .nan"), ("c.yaml", ALIASES),
        ("c.yaml", b"tool_patterns: {a: '(x{99999999999})'}"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_read_are_refused_as_such(name, data, tmp_path):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        load_config(None, {CONFIG_VARIABLE: str(file)})
    assert len(str(refused.value)) < 100_000


def test_a_user_id_that_is_nested_without_end_names_nobody():
    user = '{"a": ' + "[" * 4000
    assert identify({}, {"metadata": {"user_id": user}}, Rules()).session is None


def test_a_model_that_is_no_name_is_none():
    model: object = "m"
    for _ in range(5000):
        model = [model]
    body = {"model": model, "messages": [{"role": "user", "content": "go"}]}
    assert MessageLineage(10, 10.0).recognise("t", body, 0.0)


@pytest.mark.parametrize("tokens", [b"-1", b"1" + b"0" * 400])
def test_a_report_beyond_all_bounds_is_none(tokens):
    known = b'"started": "a", "used_tokens": 0, "running": 0, "waiting": 0'
    with pytest.raises(ReportError):
        parse_state(b'{%s, "kv_tokens": %s}' % (known, tokens), 0.0)


def test_a_report_that_is_not_utf_8_is_none():
    with pytest.raises(ReportError):
        parse_state(b'{"started": "\x80"}', 0.0)


def test_metrics_beyond_all_bounds_are_passed_over():
    usage = 'vllm:kv_cache_usage_perc{engine="0"} 0.5\n'
    text = usage + 'vllm:num_requests_running{engine="0"} 1e999\n'
    assert parse_metrics(text, None, 0.0).running == 0
    blocks = "9" * 400
    text = usage + f'vllm:cache_config_info{{num_gpu_blocks="{blocks}",block_size="16"}} 1\n'
    assert parse_metrics(text, None, 0.0).kv_tokens == 0


def test_a_list_of_backends_that_is_no_text_is_refused_and_later_ones_are_read(tmp_path):
    backends = Backends(make_placer("saga"), lambda: Health(1, 1, 1, 1.0))
    path = tmp_path / "backends"
    path.write_bytes(b"http://first:1")
    file = BackendsFile(path)
    assert file.update(backends)
    path.write_bytes(b"http://second:1 \xff")
    with pytest.raises(AddressError, match="no text"):
        file.update(backends)
    path.write_bytes(b"http://third:1")
    assert file.update(backends)
    assert [backend.name for backend in backends] == ["third:1"]


@pytest.mark.parametrize("text", ["https://[:1]:9/path/", "http://[::1]:x"])
def test_a_backend_whose_port_is_no_number_is_refused(text):
    with pytest.raises(AddressError, match="no URL"):
        Address.parse(text)


@pytest.mark.parametrize("data", [b'{"name": "\xff"}', DEEP])
def test_hardware_that_is_no_json_is_refused_by_name(data, tmp_path):
    file = tmp_path / "mine.json"
    file.write_bytes(data)
    with pytest.raises(HardwareError, match=r"mine\.json"):
        presets.load(file)


def test_hardware_with_a_number_that_no_float_holds_is_refused_by_name(tmp_path):
    file = tmp_path / "mine.json"
    given = presets.msgspec.json.encode(presets.load("llama3-70b-4xa100"))
    file.write_bytes(given.replace(b'"kv_tokens":', b'"kv_tokens":1' + b"0" * 400))
    with pytest.raises(HardwareError, match=r"mine\.json.*kv_tokens: must be at most"):
        presets.load(file)


@pytest.mark.parametrize("data", [DEEP, b'{"calls": ' + DEEP, b'{"requests": 1}\n' + DEEP])
def test_a_trace_that_is_nested_without_end_is_refused_by_name(data, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(data)
    with pytest.raises(TraceError, match=r"mine\.jsonl"):
        formats.load(file)


@pytest.mark.parametrize("data", [DEEP, b"1" + b"0" * 400])
def test_arrivals_that_are_no_seconds_are_refused(data, tmp_path):
    file = tmp_path / "arrivals"
    file.write_bytes(data)
    with pytest.raises(load.LoadError):
        load.read_arrivals(file)
