"""Dashboards and alerts ask for what the code tells, and all that it tells is asked for."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from deploy_files import ALERTS, DASHBOARDS, DEPLOY, metric_names, panels, queries, rules
from prometheus_client import CollectorRegistry
from typer.main import get_command
from vllm.v1.metrics import loggers

from vllm_saga.cli import app
from vllm_saga.config import SagaConfig
from vllm_saga.engine.metrics import EngineMetrics
from vllm_saga.engine.series import PREFIX
from vllm_saga.router.backends import Backends
from vllm_saga.router.health import Health
from vllm_saga.router.metrics import Metrics
from vllm_saga.router.replicas import BasePlacer


def samples(registry: CollectorRegistry) -> set[str]:
    """What the metrics of a registry are called when they are scraped."""
    names = set()
    for metric in registry.collect():
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
        names |= {metric.name + end for end in endings.get(metric.type, [""])}
    return names


@pytest.fixture(scope="module")
def engine_names() -> set[str]:
    registry = CollectorRegistry()
    EngineMetrics("model", [0], registry)
    return samples(registry)


@pytest.fixture(scope="module")
def router_names() -> set[str]:
    metrics = Metrics(Backends(BasePlacer(), Health), lambda: 0)
    return samples(metrics._registry)


@pytest.fixture(scope="module")
def known(engine_names, router_names) -> set[str]:
    of_vllm = set(re.findall(r'name="(vllm:\w+)"', inspect.getsource(loggers)))
    assert len(of_vllm) > 20
    totals = {f"{name}_total" for name in of_vllm}
    return engine_names | router_names | of_vllm | totals


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_asks_for_metrics_that_there_are(dashboard, known):
    for title, query in queries(dashboard):
        names = metric_names(query)
        assert names and names <= known, (title, names - known)
    variables = json.loads(dashboard.read_text())["templating"]["list"]
    asked = {name for v in variables for name in metric_names(str(v.get("definition", "")))}
    assert asked and asked <= known


def test_all_that_is_told_is_shown(engine_names, router_names):
    texts = [query for path in DASHBOARDS for _, query in queries(path)]
    shown = metric_names(" ".join(texts))

    def series(names: set[str]) -> set[str]:
        return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}

    assert series(engine_names | router_names) <= series(shown)
    assert all(name.startswith((PREFIX, "saga_router_")) for name in engine_names | router_names)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_can_be_imported_anywhere(dashboard):
    board = json.loads(dashboard.read_text())
    assert re.fullmatch(r"[a-z-]{1,40}", board["uid"]) and "id" not in board
    assert board["templating"]["list"][0]["type"] == "datasource"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        assert panel["description"].endswith(".") and panel["title"]
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        taken |= cells


def test_variables_are_filters_of_every_query():
    for dashboard in DASHBOARDS:
        names = [v["name"] for v in json.loads(dashboard.read_text())["templating"]["list"][1:]]
        for title, query in queries(dashboard):
            selectors = re.findall(r"\{([^}]*)\}", query)
            assert len(selectors) == len(re.findall(r"vllm:|saga_router_", query))
            for selector in selectors:
                assert all(f'=~"${name}"' in selector for name in names), (title, selector)


def test_alerts_ask_for_metrics_that_there_are_and_say_what_to_do(known):
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 10
    for rule in rules():
        asked = metric_names(rule["expr"])
        assert asked and asked <= known, (rule["alert"], asked - known)
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_flags_and_settings_that_alerts_name_exist():
    router = get_command(app).commands["router"]  # type: ignore[attr-defined]
    flags = {flag for parameter in router.params for flag in parameter.opts}
    of_vllm = {"--no-enable-prefix-caching", "--gpu-memory-utilization", "--kv-cache-dtype"}
    text = ALERTS.read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", text)) <= flags | of_vllm
    for setting in ("max_hold_s", "patience", "graph_path", "tenant_weights"):
        assert setting in text and setting in SagaConfig.model_fields
    tested = (DEPLOY / "prometheus" / "alerts_test.yaml").read_text()
    assert all(alert in {r["alert"] for r in rules()} for alert in re.findall(r"\bSaga\w+", tested))
