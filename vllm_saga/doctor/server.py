"""Checks of a running vLLM server: what it runs, and what its numbers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_saga.client import Client, Reply
from vllm_saga.doctor.findings import Finding, ok, problem, warning
from vllm_saga.doctor.versions import check_version

_RESTART = "Start it with VLLM_PLUGINS=saga, --scheduler-cls saga"
# Shares are judged from so many calls on.
_ENOUGH = 20
_MANY = 0.5
_MANY_FORCED = 0.1


async def check_server(client: Client) -> list[Finding]:
    """Raises UnreachableError if nobody answers."""
    models, version = await client.get("/v1/models"), await client.get("/version")
    if models.status in (401, 403):
        return [problem("API key", f"{client.url}: {models.error}", "Pass it with --api-key.")]
    findings = [check_version("server", str(version.values().get("version", "unknown")))]
    state, metrics = await client.get("/v1/saga/state"), await client.get("/metrics")
    findings += _check_state(state)
    if metrics.status == 200:
        findings += _check_metrics(_samples(metrics.text), _longest(models))
    else:
        findings.append(
            warning(
                "metrics",
                f"/metrics: {metrics.error}",
                "Without --disable-log-stats vLLM serves them; the rest cannot be checked.",
            )
        )
    return findings


def _check_state(reply: Reply) -> Iterator[Finding]:
    state, check = reply.values(), "scheduler"
    if reply.status == 404:
        error = state.get("error")
        if isinstance(error, dict) and error.get("type") == "saga":
            yield problem(check, reply.error, f"{_RESTART}.")
        else:
            yield warning("/v1/saga", "not served", "Start vLLM with VLLM_PLUGINS=saga.")
        return
    if reply.status != 200:
        yield problem(check, f"/v1/saga/state: {reply.error}", "Look into the server's log.")
        return
    for rank, report in enumerate(state.get("ranks") or [state]):
        yield _check_engine(f"{check}, rank {rank}" if "ranks" in state else check, report)
        yield from _check_deadlines(report.get("saga") or {})


def _check_engine(check: str, report: Mapping[str, Any]) -> Finding:
    if report.get("saga"):
        held = len(report.get("held_calls", ()))
        return ok(check, f"saga: {report.get('resident')} workflows resident, {held} calls held")
    return problem(
        check,
        "it schedules as stock vLLM does",
        "Prefix caching is off (remove --no-enable-prefix-caching), or the policy has failed: the "
        "log says which, after `saga:`. Please report a failure.",
    )


def _check_deadlines(saga: Mapping[str, float]) -> Iterator[Finding]:
    holds, forced = saga.get("holds", 0), saga.get("forced", 0)
    if holds >= _ENOUGH and forced > _MANY_FORCED * holds:
        yield warning(
            "deadlines",
            f"{forced} of {holds} holds ended by max_hold_s, not by room",
            "It is overloaded: each of these calls had its context computed for itself alone. Add "
            "servers, admit fewer agents, or raise max_hold_s together with the clients' timeouts.",
        )


Samples = Mapping[str, list[tuple[Mapping[str, str], float]]]


def _samples(text: str) -> Samples:
    """Samples by name; a family that has none yet is there, too."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            found.setdefault(family.name, [])
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    except ValueError:
        return {}
    return found


def _check_metrics(samples: Samples, longest: int | None) -> Iterator[Finding]:
    yield from _check_pool(samples, longest)
    if "vllm:saga_callers" not in samples:
        yield warning(
            "middleware",
            "off: clients' own session headers are not read",
            "If agents send some, add --middleware vllm_saga.server.SessionHeaders. vLLM's ids "
            "and the prompts themselves are recognised without it.",
        )
        return
    callers = {
        labels.get("source", ""): value
        for labels, value in samples.get("vllm:saga_callers_total", [])
    }
    total = sum(callers.values())
    if total >= _ENOUGH and callers.get("none", 0.0) > _MANY * total:
        yield warning(
            "sessions",
            f"{callers['none']:.0f} of {total:.0f} requests named none",
            "Their prompts tell whose they are, as long as they only grow. Ids are safer: see "
            "session_headers for a header of your own.",
        )
    else:
        named = ", ".join(f"{name} {count:.0f}" for name, count in sorted(callers.items()))
        yield ok("middleware", f"on: {named or 'no request yet'}")
    conflicts = sum(value for _, value in samples.get("vllm:saga_id_conflicts_total", []))
    if conflicts:
        yield warning(
            "sessions",
            f"{conflicts:.0f} requests named two",
            "The first source counts (docs/agents.md, `Agents that send their own headers`).",
        )


def _check_pool(samples: Samples, longest: int | None) -> Iterator[Finding]:
    for labels, _ in samples.get("vllm:cache_config_info", [])[:1]:
        if labels.get("enable_prefix_caching") == "False":
            yield problem(
                "prefix caching",
                "off: there is no KV to keep between calls",
                "Remove --no-enable-prefix-caching.",
            )
            return
        yield ok("prefix caching", "on")
        try:
            tokens = int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        except (KeyError, ValueError):
            return
        if longest and tokens < 2 * longest:
            yield warning(
                "KV pool",
                f"{tokens} tokens: less than two contexts of {longest}",
                "More --gpu-memory-utilization, or less --max-model-len.",
            )
        else:
            yield ok("KV pool", f"{tokens} tokens")


def _longest(models: Reply) -> int | None:
    """The longest context that the server takes."""
    data = models.values().get("data")
    lengths = [m.get("max_model_len") for m in data if isinstance(m, dict)] if data else []
    return max((length for length in lengths if isinstance(length, int)), default=None)
