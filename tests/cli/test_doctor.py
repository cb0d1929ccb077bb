"""`vllm-saga doctor`: every problem is found, and comes with what to do."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from small_server import serving
from typer.testing import CliRunner

from vllm_saga.cli import app
from vllm_saga.doctor.findings import Level
from vllm_saga.doctor.installed import check_plugins, check_settings
from vllm_saga.doctor.parsers import SAMPLES, check_parser
from vllm_saga.doctor.versions import OLDEST, TESTED, check_version
from vllm_saga.engine import compat

runner = CliRunner(env={"COLUMNS": "120", "SAGA_CONFIG": "", "VLLM_PLUGINS": "saga"})

ENGINE = {"resident": 2, "held_calls": [], "saga": {"holds": 100, "forced": 1}}
METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",enable_prefix_caching="True",num_gpu_blocks="1000"} 1.0
# TYPE vllm:saga_callers counter
vllm:saga_callers_total{source="claude"} 60.0
vllm:saga_callers_total{source="none"} 5.0
# TYPE vllm:saga_id_conflicts counter
vllm:saga_id_conflicts_total 0.0
"""
HEALTHY = {
    "/version": (200, {"version": "0.32.0"}),
    "/v1/models": (200, {"data": [{"id": "m", "max_model_len": 4096}]}),
    "/v1/saga/state": (200, ENGINE),
    "/metrics": (200, METRICS),
}


@pytest.fixture
def quick(monkeypatch):
    """Without the checks that import vLLM."""
    monkeypatch.setattr("vllm_saga.doctor.command.check_vllm", list)


def ask(answers, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    with serving(answers) as url:
        result = runner.invoke(app, ["doctor", "--json", "--url", url, *arguments])
    found = json.loads(result.stdout)
    for finding in found:
        assert bool(finding["advice"]) == (finding["level"] != Level.OK), finding
    return result.exit_code, {finding["check"]: finding for finding in found}


def test_a_healthy_server_has_no_problem(quick):
    code, found = ask(HEALTHY)
    assert code == 0
    assert {f["level"] for f in found.values()} == {"ok"}
    assert found["KV pool"]["found"] == "32000 tokens"
    assert "2 workflows resident" in found["scheduler"]["found"]


@pytest.mark.parametrize(
    "path, answer, check, level, said",
    [
        ("/version", (200, {"version": "0.27.1"}), "server", "problem", "Upgrade"),
        ("/v1/saga/state", (404, {"detail": "Not Found"}), "/v1/saga", "warning", "VLLM_PLUGINS"),
        (
            "/v1/saga/state",
            (404, {"error": {"type": "saga", "message": "runs without --scheduler-cls saga"}}),
            "scheduler", "problem", "--scheduler-cls saga",
        ),
        ("/v1/saga/state", (500, "x"), "scheduler", "problem", "log"),
        ("/v1/saga/state", (200, {**ENGINE, "saga": {}}), "scheduler", "problem", "prefix"),
        (
            "/v1/saga/state", (200, {"ranks": [ENGINE, {**ENGINE, "saga": {}}]}),
            "scheduler, rank 1", "problem", "stock",
        ),
        (
            "/v1/saga/state", (200, {**ENGINE, "saga": {"holds": 100, "forced": 40}}),
            "deadlines", "warning", "40 of 100",
        ),
        ("/v1/models", (401, {"error": "Unauthorized"}), "API key", "problem", "--api-key"),
        (
            "/v1/models", (200, {"data": [{"max_model_len": 20_000}]}),
            "KV pool", "warning", "32000",
        ),
        ("/metrics", (404, ""), "metrics", "warning", "log-stats"),
        (
            "/metrics", (200, METRICS.replace('"True"', '"False"')),
            "prefix caching", "problem", "--no-enable-prefix-caching",
        ),
        (
            "/metrics", (200, METRICS.replace("saga_callers", "x")),
            "middleware", "warning", "--middleware",
        ),
        (
            "/metrics", (200, METRICS.replace('"none"} 5', '"none"} 500')),
            "sessions", "warning", "500 of 560",
        ),
        (
            "/metrics", (200, METRICS.replace("conflicts_total 0", "conflicts_total 7")),
            "sessions", "warning", "7 requests",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_server_is_found(quick, path, answer, check, level, said):
    code, found = ask(HEALTHY | {path: answer})
    finding = found[check]
    assert finding["level"] == level and code == (level == "problem")
    assert said in finding["found"] + finding["advice"]


def test_nobody_answers(quick):
    result = runner.invoke(app, ["doctor", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1 and "does not answer" in result.stdout


def backend(name: str, **changes: object) -> dict[str, object]:
    up = {"id": name, "url": f"http://{name}", "state": "up", "draining": False}
    return {**up, "speaks_saga": True, "report": {"resident": 3, "held": 1}, **changes}


def test_a_router_is_asked_for_its_backends(quick):
    backends = [
        backend("a"),
        backend("b", state="down"),
        backend("c", draining=True),
        backend("d", speaks_saga=False),
    ]
    code, found = ask({"/v1/saga/backends": (200, {"backends": backends})})
    levels = [found[f"backend {name}"]["level"] for name in "abcd"]
    assert levels == ["ok", "problem", "warning", "warning"] and code == 1
    assert "3 of 4" in found["router"]["found"]
    assert "/v1/saga/backends/c/undrain" in found["backend c"]["advice"]


def test_a_router_without_backends_or_key(quick):
    assert ask({"/v1/saga/backends": (200, {"backends": []})})[0] == 1
    refused = {"type": "error", "error": {"type": "unauthorized", "message": "wrong key"}}
    code, found = ask({"/v1/saga/backends": (401, refused)})
    assert code == 1 and "operator" in found["router"]["advice"]


def test_this_installation_fits():
    result = runner.invoke(app, ["doctor", "--json", "--tool-call-parser", "qwen3_coder"])
    found = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 0
    for check in ("vLLM", "contract with vLLM", "--scheduler-cls saga", "/v1/saga", "tool parser"):
        assert found[check]["level"] == "ok", found[check]


def test_a_vllm_that_lacks_something_is_named(monkeypatch):
    monkeypatch.delattr("vllm.v1.core.block_pool.BlockPool.get_num_free_blocks")
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1 and "get_num_free_blocks" in result.stdout


# -- plugins, settings, versions, parsers ---------------------------------------------------------


@pytest.mark.parametrize(
    "named, scheduler, endpoints",
    [
        (None, "ok", "warning"),
        ("saga", "ok", "ok"),
        ("other,saga", "ok", "ok"),
        ("other", "problem", "warning"),
        ("", "problem", "warning"),
    ],
)
def test_what_vllm_plugins_lets_through(named, scheduler, endpoints):
    environ = {} if named is None else {"VLLM_PLUGINS": named}
    found = {f.check: f for f in check_plugins(environ)}
    assert found["--scheduler-cls saga"].level == scheduler
    assert found["/v1/saga"].level == endpoints
    if endpoints == "warning":
        assert "saga" in found["/v1/saga"].advice.rpartition("VLLM_PLUGINS=")[2]


def test_other_plugins_that_vllm_plugins_leaves_out_are_named(monkeypatch):
    group = "vllm.general_plugins"
    plugins = [
        EntryPoint("saga", "vllm_saga.plugin:register", group),
        EntryPoint("lora", "vllm.plugins.lora:register", group),
        EntryPoint("theirs", "theirs:register", group),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
    (finding,) = [f for f in check_plugins({"VLLM_PLUGINS": "saga"}) if f.check == "VLLM_PLUGINS"]
    assert finding.found.endswith("leaves out theirs")
    assert finding.advice.endswith("VLLM_PLUGINS=saga,theirs.")
    found = check_plugins({"VLLM_PLUGINS": "theirs,saga"})
    assert "VLLM_PLUGINS" not in {f.check for f in found}


def settings_of(tmp_path: Path, text: str) -> dict[str, Level]:
    file = tmp_path / "saga.yaml"
    file.write_text(text)
    return {finding.check: finding.level for finding in check_settings(file, {})[1]}


def test_settings_are_checked_and_doubted(tmp_path):
    assert settings_of(tmp_path, "headroom: 0.1") == {"settings": Level.OK}
    assert settings_of(tmp_path, "headroom: 7") == {"settings": Level.PROBLEM}
    assert settings_of(tmp_path, "max_hold_s: 900")["max_hold_s"] == Level.WARNING
    assert settings_of(tmp_path, "residency: false")["residency"] == Level.WARNING
    found = settings_of(tmp_path, f"graph_path: {tmp_path}/missing/graph.json")
    assert found["graph_path"] == Level.PROBLEM
    config, findings = check_settings(None, {"SAGA_CONFIG": str(tmp_path / "none.json")})
    assert config is None and "none.json" in findings[0].found


@pytest.mark.parametrize(
    "text, level",
    [
        ("0.27.9", Level.PROBLEM),
        ("0.28.0", Level.OK),
        ("0.32.1+cpu", Level.OK),
        ("0.99.0", Level.WARNING),
        ("dev", Level.WARNING),
    ],
)
def test_versions(text, level):
    assert check_version("vLLM", text).level == level


def test_versions_are_those_of_the_project():
    wanted = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    oldest = next(d for d in wanted["project"]["dependencies"] if d.startswith("vllm"))
    assert tuple(map(int, re.findall(r"\d+", oldest))) == OLDEST
    tested = re.findall(r"(\d+)\.(\d+)", compat.TESTED_VERSIONS)
    assert [tuple(map(int, version)) for version in tested] == [OLDEST, TESTED]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_parsers_that_are_said_to_be_read_are_vllm_s_and_read(name):
    from vllm.tool_parsers import ToolParserManager

    assert name in ToolParserManager.list_registered()
    assert check_parser(name, {}).level == Level.OK


def test_other_parsers():
    assert check_parser("step3", {}).level == Level.WARNING
    unknown = check_parser("hermse", {})
    assert unknown.level == Level.PROBLEM and "hermes" in unknown.advice
