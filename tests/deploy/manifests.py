"""The manifests and Helm values of deploy/, and what they say of containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
ROUTER = DEPLOY / "kubernetes" / "router.yaml"
VALUES = DEPLOY / "production-stack" / "values.yaml"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
#: The release and the model that deploy/kubernetes/router.yaml selects.
RELEASE = "saga"


def manifest(kind: str, name: str) -> dict[str, Any]:
    """One object of the router's manifest."""
    objects = yaml.safe_load_all(ROUTER.read_text())
    return next(o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))


def router_pod() -> dict[str, Any]:
    """The template of the router's pods."""
    return manifest("Deployment", "saga-router")["spec"]["template"]


def values() -> dict[str, Any]:
    return yaml.safe_load(VALUES.read_text())


def model_spec() -> dict[str, Any]:
    """The one model of the Helm values."""
    (spec,) = values()["servingEngineSpec"]["modelSpec"]
    return spec


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Variables whose values the manifest holds."""
    return {v["name"]: v["value"] for v in container["env"] if "value" in v}
