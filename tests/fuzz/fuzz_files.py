"""Fuzzers of what operators give: settings, traces, graphs, hardware, backends, options."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fuzz_registry import fuzzes
from fuzz_shapes import changed, damaged, encoded, lines, shallow, texts, values
from hypothesis import strategies as st

from vllm_saga.config import CONFIG_VARIABLE, ConfigError, SagaConfig, load_config
from vllm_saga.engine.memory import GraphFile
from vllm_saga.policy.graph import AgentClasses
from vllm_saga.policy.memory import GraphError, decode, encode, restore, snapshot
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.workflow import Arrival
from vllm_saga.router.backends import AddressError, Backends, BackendsFile, parse_list
from vllm_saga.router.health import Health
from vllm_saga.router.placement import make_placer
from vllm_saga.simulator import formats, load, policies, presets
from vllm_saga.simulator.hardware import Batch, HardwareError
from vllm_saga.simulator.trace import Session, TraceError

_FOLDER = tempfile.TemporaryDirectory(prefix="saga-fuzz-")


def written(name: str, data: bytes) -> Path:
    path = Path(_FOLDER.name) / name
    path.write_bytes(data)
    return path


# -- settings --------------------------------------------------------------------------------------

SETTINGS = {name: field.default for name, field in SagaConfig.model_fields.items()} | {
    "tool_patterns": {"mine": "call ([a-z]+)"}, "tenant_weights": {"a": 2.0},
    "session_headers": ["X-Task"], "slo_factor": 2.0,
}  # fmt: skip
PATTERNS = ("(a", "a", "(a)(b)", "(a{99999999999})", "(" * 5000 + ")" * 5000, "(?P<x>a)", "\0(b)")
settings = changed(st.just(SETTINGS), 3) | st.dictionaries(
    st.sampled_from(list(SETTINGS)), values, max_size=4
)
patterns = st.sampled_from(PATTERNS).map(lambda p: {"tool_patterns": {"p": p}})
yamls = shallow.map(lambda value: yaml.safe_dump({"headroom": value}).encode()) | st.sampled_from(
    [
        b"[" * 3000, b"{a: " * 3000, b"!!int ''", b"!!bool x", b"!!timestamp x", b"!!float x",
        b"!!binary x", b"!!set x", b"!!omap x", b"? [a]\n: b", b"a: 2020-99-99", b"&a [*a]",
        b"!!python/object/apply:os.abort []", b"headroom: .nan", b"max_hold_s: .inf",
        b"session_headers: [1, 2]", b"1: 2", b"a: 1_0:1", b"\xff\xfe", b"--- a\n--- b",
        b"x0: &x0 [a, a]\n" + b"".join(b"x%d: &x%d [*x%d, *x%d]\n" % (n, n, n - 1, n - 1)
                                      for n in range(1, 28)),
    ]
)  # fmt: skip
config_files = st.tuples(
    st.sampled_from(["c.json", "c.yaml"]),
    (encoded(settings | patterns) | yamls | st.binary(max_size=80)).flatmap(damaged),
)


@fuzzes("config", config_files | settings | patterns | values)
def check_config(given: Any) -> None:
    """A configuration is refused as such, or an engine can run with it."""
    try:
        if isinstance(given, tuple):
            config = load_config(None, {CONFIG_VARIABLE: str(written(*given))})
        else:
            config = load_config({"saga": given}, {})
    except ConfigError as error:
        assert len(str(error)) < 100_000
        return
    saga = SagaPolicy(config, 20, 16)
    for number in range(6):
        now = float(number)
        chain = [hash((number % 3, block)) for block in range(6)]
        saga.on_arrival(Arrival(f"c{number}", chain, 96, session_id=str(number % 3)), now)
        saga.on_step(now)
        owner = saga.owner(f"c{number}")
        if owner is not None:
            assert len(saga.keep_ranks([owner], now)) == 1
    for number in range(6):
        saga.on_finish(f"c{number}", 100, 10.0 + number, ("bash",))
        saga.on_step(10.0 + number)
    assert not saga.calls and saga.residency.held_calls == 0


# -- traces ----------------------------------------------------------------------------------------

CALL = {
    "prompt_tokens": 100, "new_tokens": 40, "output_tokens": 5, "tool": "bash", "gap": "tool",
    "tool_latency_s": 1.0, "llm_s": 2.0, "ttft_s": 0.1,
}  # fmt: skip
OURS = {
    "session_id": "s", "arrival_s": 1.0, "tenant": "t", "source": "x",
    "calls": [
        CALL,
        {**CALL, "kind": "branch", "parent": 0, "deps": [0], "delay_s": 1.0, "agent": "a"},
    ],
    "shared_prefix": {"group": "g", "tokens": 16},
}  # fmt: skip
MOONCAKE = {
    "input_length": 1000, "output_length": 10, "timestamp": 5.0, "hash_ids": [1, 2],
    "session_id": "s", "delay": 10.0,
}  # fmt: skip
REQUEST = {
    "t": 1.0, "type": "n", "in": 200, "out": 10, "model": "m", "hash_ids": [1, 2, 3],
    "input_types": ["tool_result"], "output_types": ["text"], "stop": "end_turn", "api_time": 2.0,
}  # fmt: skip
TESTER = {
    "id": "a", "block_size": 64, "tool_tokens": 10, "system_tokens": 10, "hash_id_scope": "global",
    "requests": [
        REQUEST,
        {"t": 9.0, "type": "subagent", "duration_ms": 5, "agent_id": "x", "requests": [REQUEST]},
        {**REQUEST, "t": 20.0},
    ],
}  # fmt: skip
trace = changed(st.sampled_from([OURS, MOONCAKE, TESTER]), 3)
trace_files = lines(trace) | encoded(trace) | encoded(values) | st.binary(max_size=60)


def check_session(session: Session) -> None:
    """What the simulator asks of a session has an answer that is a number."""
    assert math.isfinite(session.ideal_s) and session.ideal_s >= 0.0
    assert math.isfinite(session.context_token_seconds) and math.isfinite(session.model_s)
    assert len(session.parents) == len(session.deps) == len(session.calls)
    for call in session.calls:
        assert 0 <= call.reusable_tokens <= call.prompt_tokens


@fuzzes("traces", trace_files)
def check_traces(data: bytes) -> None:
    path = written("trace.jsonl", data)
    try:
        sessions = formats.load(path)
        for session in sessions:
            check_session(session)
        formats.population(sessions, 2, 0, max_gap_s=10.0, max_context=100_000)
    except TraceError as error:
        assert str(path) in str(error) or "none of" in str(error)


def numbers() -> st.SearchStrategy[bytes]:
    rows = shallow | st.floats().map(lambda x: {"arrival_s": x}) | st.floats()
    return lines(rows) | st.binary(max_size=60)


@fuzzes("arrivals", numbers())
def check_arrivals(data: bytes) -> None:
    try:
        found = load.read_arrivals(written("arrivals", data))
    except load.LoadError:
        return
    assert found == sorted(found) and all(0 <= at < math.inf for at in found)


# -- graphs ----------------------------------------------------------------------------------------


def learned() -> dict[str, Any]:
    classes = AgentClasses()
    for name in ("a", "b"):
        agent = classes.get(("t", name.encode()))
        for calls in range(12):
            agent.observe_call("bash", "edit", 100 * calls)
            agent.gaps_after("bash").observe_return(1.0 + calls)
            agent.observe_cycle(3.0)
            agent.observe_progress(calls)
        agent.observe_end(12)
    document: dict[str, Any] = json.loads(encode(snapshot(classes)))
    return document


graphs = encoded(changed(st.just(learned()), 4) | values) | st.binary(max_size=100)


@fuzzes("graphs", graphs)
def check_graphs(data: bytes) -> None:
    """A graph is refused, or can be used, learned into and saved again."""
    path = written("graph.json", data)
    classes = AgentClasses()
    try:
        document = decode(data)
    except GraphError:
        assert not GraphFile(path, 60.0).load(classes)
        assert not path.exists() and len(classes) == 0
        return
    assert GraphFile(path, 60.0).load(classes)
    decode(encode(snapshot(classes)))
    scratch = AgentClasses()
    restore(scratch, document)
    for _, agent in list(scratch.items()):
        for _ in range(3):
            agent.observe_call("bash", "bash", 50)
            agent.observe_end(3)
            agent.gaps_after("bash").observe_return(2.0)
        assert math.isfinite(agent.remaining_calls(2)) and agent.remaining_calls(2) >= 0.0
        assert agent.gaps.quantile_s(0.5) >= 0.0 and agent.cycle_s > 0.0
        for mean, spread in agent.outlook(3, None, 100.0, (1.0, 60.0)):
            assert math.isfinite(mean) and spread >= -1e-3
    decode(encode(snapshot(scratch)))


# -- hardware --------------------------------------------------------------------------------------

HARDWARE = [json.loads(presets.msgspec.json.encode(found)) for found in presets.PRESETS.values()]
LINEAR = {**HARDWARE[0], "cost": {"kind": "linear", "base_s": 0.01, "token_s": 1e-5}}
hardware = encoded(changed(st.sampled_from([*HARDWARE, LINEAR]), 3) | values)


@fuzzes("hardware", hardware | st.binary(max_size=60))
def check_hardware(data: bytes) -> None:
    path = written("hardware.json", data)
    try:
        found = presets.load(path)
    except HardwareError as error:
        assert str(path) in str(error)
        return
    step_s = found.cost.step_s(Batch(100, 4, 50_000, 10_000))
    assert 0.0 < step_s < math.inf
    assert found.kv_tokens > 0


# -- backends, options -----------------------------------------------------------------------------

ADDRESSES = (
    "http://10.0.0.1:8000", "http://host:1#0", "https://[::1]:9/path/", "# comment", "ftp://x",
    "http://", "http://h:99999", "http://u:p@h", "http://h?q", "http://h#x", "http://h:1#9999999",
    "http://[::1", "http://h:x", "//h", "http://\u2100", "http://h\0:1",
)  # fmt: skip
address_lists = st.lists(st.sampled_from(ADDRESSES) | texts, max_size=5).map("\n".join)
backend_files = (
    address_lists.map(lambda text: text.encode("utf-8", "surrogatepass")).flatmap(damaged)
    | st.binary(max_size=60)
)  # fmt: skip


@fuzzes("backends", address_lists)
def check_backends(text: str) -> None:
    try:
        found = parse_list(text)
    except AddressError:
        return
    for address in found:
        assert address.url.startswith(("http://", "https://")) and address.name


@fuzzes("backends-file", backend_files)
def check_backends_file(data: bytes) -> None:
    """Its mistakes leave the backends as they were."""
    backends = Backends(make_placer("saga"), lambda: Health(1, 1, 1, 1.0))
    path = written("backends", b"http://first:1")
    file = BackendsFile(path)
    file.update(backends)
    path.write_bytes(data + b" ")
    try:
        file.update(backends)
    except (AddressError, OSError):
        assert [backend.name for backend in backends] == ["first:1"]


def parts(*pieces: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces) | texts, max_size=5).map("".join)


LOADS = (
    "closed:", "open:", "overcommit:", "auto", "80", "%", "trace", ",cv=", ",rate=", "3", "1e999",
    "nan", "-1", "0", "inf", "9" * 400, "0.5", "１", "1_0",
)  # fmt: skip


@fuzzes("loads", parts(*LOADS))
def check_loads(text: str) -> None:
    try:
        found = load.parse(text)
    except load.LoadError as error:
        assert repr(text) in str(error)
        return
    if isinstance(found, load.Closed):
        assert found.lanes > 0
    if isinstance(found, load.Overcommit):
        assert 0 < found.factor < math.inf
    if isinstance(found, load.Open) and found.rate_per_min is not None and not found.trace:
        assert 0 < found.rate_per_min < math.inf


NAMES = (*policies.names(), "static-cap:", "fixed-ttl:", "14", "1e999", "9" * 5000, "nan", "auto")


@fuzzes("policies", parts(*NAMES))
def check_policies(name: str) -> None:
    """Of the simulator and of the router."""
    refused: list[tuple[Callable[[str], Any], type[Exception]]] = [
        (policies.maker, policies.UnknownPolicy), (make_placer, ValueError),
    ]  # fmt: skip
    for make, error in refused:
        try:
            make(name)
        except error as said:
            assert type(said) is error
