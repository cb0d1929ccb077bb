"""What deploy/ holds, and the names of metrics in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"

_NAME = re.compile(r"\b(?:vllm:|saga_router_)\w+")


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """Those that show something."""
    return [p for p in json.loads(dashboard.read_text())["panels"] if p["type"] != "row"]


def queries(dashboard: Path) -> list[tuple[str, str]]:
    """(title of the panel, PromQL) of every target."""
    return [(p["title"], target["expr"]) for p in panels(dashboard) for target in p["targets"]]


def rules() -> list[dict[str, Any]]:
    """Every alert rule."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metric_names(text: str) -> set[str]:
    """The metrics that a query or a template names."""
    return set(_NAME.findall(text))
