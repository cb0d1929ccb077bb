"""SagaConfig: every knob, with its unit, default and source, and where it is read from."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_saga.policy.tools import ToolNames

CONFIG_VARIABLE = "SAGA_CONFIG"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field, the value and what is allowed."""


class SagaConfig(BaseModel):
    """The operator's knobs. The defaults suit coding agents on one engine."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    residency: bool = Field(
        True, description="Hold calls of workflows that do not fit the KV pool; off = never hold."
    )
    retention: Literal["value", "wa-lru", "continuum", "lru", "stock"] = Field(
        "value",
        description="Which cached contexts are evicted first, after dead ones and those of nobody: "
        "value = least value density, wa-lru = the SAGA paper's score and TTL, continuum = LRU but "
        "for its time to live, lru; stock = vLLM's own order, which knows no contexts.",
    )
    lineage: bool = Field(
        True, description="Recognise a session by its prompt prefix where no id is sent."
    )
    headroom: float = Field(
        0.02, ge=0.0, le=0.5, description="Share of the KV pool that residency leaves unpromised."
    )
    patience: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="0 = most throughput: a workflow in a gap gives way to those who wait, and "
        "room is left for the growth that is expected; 1 = smoothest steps: who has a place keeps "
        "it, and room is left for two standard deviations more.",
    )
    give_up_probability: float = Field(
        0.1,
        gt=0.0,
        lt=1.0,
        description="An idle workflow loses its place when its chance to return falls below this.",
    )
    overdraft: float = Field(
        2.0,
        ge=0.0,
        description="A workflow is held rather than computing again what the pool lacks where that "
        "costs more, in each of its cycles (a call and a gap), than so many cycles of progress: "
        "0 = the pool is never overdrawn.",
    )
    short_first: float = Field(
        10.0,
        ge=0.0,
        description="Seconds by which a workflow counts as younger for every second that it is "
        "expected to fill the whole KV pool: 0 = oldest first, large = shortest first.",
    )
    pace_prefills: bool = Field(
        True,
        description="While agents wait for room, prefill in each step only what it computes for "
        "nothing beside its decodes; off = as much as vLLM's limits allow.",
    )
    max_hold_s: float = Field(
        540.0,
        gt=0.0,
        description="Seconds after which a held call runs whatever the budget says; keep it below "
        "your clients' timeout (Claude Code: 600 s).",
    )
    max_step_hold_s: float = Field(
        540.0,
        gt=0.0,
        description="The same for a workflow that has made a call: its agent is in mid-task. A "
        "shorter limit caps the longest waits, and costs prefills that serve one call only.",
    )
    session_idle_s: float = Field(
        1800.0, gt=0.0, description="Seconds without a call after which a session is forgotten."
    )
    max_sessions: int = Field(
        20_000, ge=1, description="Idle workflows remembered at most; the longest idle go first."
    )
    graph_path: Path | None = Field(
        None,
        description="File in which what was learned of agents outlives the server; each "
        "engine of a data-parallel server adds its number to the name.",
    )
    graph_save_s: float = Field(
        60.0,
        gt=0.0,
        description="Seconds between two saves of graph_path while busy; it is also saved when the "
        "engine has nothing to do.",
    )
    tool_patterns: dict[str, str] = Field(
        {},
        description="Further formats of tool calls in outputs: name -> regular expression whose "
        "one group is the tool's name.",
    )
    hints: bool = Field(True, description="Take hints of clients (agent_hint); off = ids only.")
    max_hint_s: float = Field(
        3600.0, ge=0.0, description="The longest gap or time to live that a hint may declare."
    )
    tenant_source: Literal["cache_salt", "saga_tenant", "none"] = Field(
        "cache_salt",
        description="What says whose a request is: its cache_salt, saga_tenant in its vllm_xargs "
        "(your gateway must set it on every request), or nothing: one tenant for all.",
    )
    session_headers: tuple[str, ...] = Field(
        (),
        description="Further headers that name a session, before those of known agents; for "
        "--middleware vllm_saga.server.SessionHeaders.",
    )
    tenant_header: str = Field(
        "x-tenant-id",
        min_length=1,
        description="Header that names the tenant: your gateway must set it over whatever a client "
        "sent. For that middleware (with tenant_source saga_tenant) and /v1/saga.",
    )
    tenant_weights: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        {}, description="Share of a tenant relative to others' 1."
    )
    fair_window_s: float = Field(
        60.0,
        ge=0.0,
        description="Engine seconds by which the service of tenants that wait may differ before "
        "the least served goes first.",
    )
    slo_factor: float | None = Field(
        None,
        gt=1.0,
        description="Deadline of workflows that declare none, in multiples of the time they need: "
        "within the window, tenants with urgent work go first. None = no deadline.",
    )

    log_interval_s: float = Field(
        10.0, ge=0.0, description="Seconds between state lines in the log while busy; 0 = none."
    )

    traces: bool = Field(
        True,
        description="Send a trace of each workflow where vLLM's --otlp-traces-endpoint says; off = "
        "vLLM's own traces only.",
    )

    @field_validator("session_headers", "tenant_header")
    @classmethod
    def _lower(cls, names: Any) -> Any:
        return names.lower() if isinstance(names, str) else tuple(name.lower() for name in names)

    @field_validator("tool_patterns")
    @classmethod
    def _readable(cls, patterns: dict[str, str]) -> dict[str, str]:
        ToolNames(patterns)
        return patterns


def load_config(additional: object | None, environ: Mapping[str, str] = os.environ) -> SagaConfig:
    """Read the knobs from the file named by SAGA_CONFIG, then from `--additional-config`'s "saga".

    A key given in both places has the value of `--additional-config`.

    Raises:
        ConfigError: unreadable file, unknown field, or a value out of range.
    """
    values: dict[str, Any] = {}
    sources: list[str] = []
    path = environ.get(CONFIG_VARIABLE)
    if path:
        values.update(_read_file(Path(path)))
        sources.append(f"{CONFIG_VARIABLE}={path}")
    inline = additional.get("saga") if isinstance(additional, Mapping) else None
    if inline is not None:
        if not isinstance(inline, Mapping):
            raise ConfigError(f'--additional-config "saga" must be an object, not {_shown(inline)}')
        values.update(inline)
        sources.append("--additional-config")
    try:
        return SagaConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, " and ".join(sources))) from None


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through what a bad tag or deep nesting causes
        raise ConfigError(f"{CONFIG_VARIABLE}={path} cannot be read: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{CONFIG_VARIABLE}={path} must hold an object of settings")
    return values


def _shown(value: object) -> str:
    """Few words for any value: a YAML file of a kilobyte may stand for one without end."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 200
    return shown.repr(value)


def _explain(error: ValidationError, source: str) -> str:
    lines = [f"Bad vllm-saga setting in {source}:"]
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(SagaConfig.model_fields)
            lines.append(f"  {field}: no such setting; there are: {known}")
        else:
            lines.append(f"  {field} = {_shown(problem['input'])}: {problem['msg']}")
    return "\n".join(lines)
