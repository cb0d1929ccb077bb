"""`vllm-saga router`: agent sessions over many vLLM servers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vllm_saga.router.backends import AddressError, parse_list
from vllm_saga.router.placement import PLACERS
from vllm_saga.router.settings import MiB, RouterSettings

if TYPE_CHECKING:
    from vllm_saga.router.app import Router

DEFAULTS = RouterSettings()
_LEVELS = ("debug", "info", "warning", "error", "critical")
_SPARE_FILES = 256


def router(
    backends: Annotated[
        str,
        typer.Option(
            "--backends",
            "--worker-urls",
            help="http://host:port,...; with #RANK for one engine of a data-parallel server.",
        ),
    ] = "",
    backends_file: Annotated[
        Path | None, typer.Option(help="The same, one a line; read again when it changes.")
    ] = None,
    policy: Annotated[str, typer.Option(help=f"{', '.join(PLACERS)}.")] = DEFAULTS.policy,
    session_headers: Annotated[
        str, typer.Option(help="Headers that name a session, before the known ones: A,B.")
    ] = "",
    tenant_header: Annotated[
        str, typer.Option(help="The header in which your gateway names the tenant.")
    ] = DEFAULTS.tenant_header,
    host: Annotated[str, typer.Option()] = DEFAULTS.host,
    port: Annotated[int, typer.Option(min=0, max=65535)] = DEFAULTS.port,
    reuse_port: Annotated[
        bool, typer.Option("--reuse-port", help="Several routers may listen on one port.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_API_KEY", help="Clients must show it; backends are sent it."),
    ] = None,
    backend_api_key: Annotated[
        str | None, typer.Option(help="Backends are sent this key instead.")
    ] = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(help="For /v1/saga; without it that is only for this machine's clients."),
    ] = None,
    log_level: Annotated[str, typer.Option(help=f"{', '.join(_LEVELS)}.")] = "info",
    max_concurrent_requests: Annotated[
        int, typer.Option(min=1, help="More get 429.")
    ] = DEFAULTS.max_in_flight,
    max_requests_per_backend: Annotated[
        int, typer.Option(min=1, help="More go elsewhere, or get 429.")
    ] = DEFAULTS.max_per_backend,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Of clients; more are closed at once.")
    ] = DEFAULTS.max_connections,
    max_json_mib: Annotated[
        int, typer.Option(min=0, help="Larger bodies are streamed, known by their headers only.")
    ] = DEFAULTS.max_json // MiB,
    max_buffered_mib: Annotated[
        int, typer.Option(min=0, help="Of all bodies together that are kept until answered.")
    ] = DEFAULTS.max_buffered // MiB,
    max_sessions: Annotated[
        int, typer.Option(min=1, help="Sessions remembered.")
    ] = DEFAULTS.max_sessions,
    session_idle_secs: Annotated[
        float, typer.Option(min=1.0, help="Idle sessions are forgotten.")
    ] = DEFAULTS.session_idle,
    retry_max_retries: Annotated[
        int, typer.Option(min=0, help="Further backends offered a call that one has refused.")
    ] = DEFAULTS.retries,
    connect_timeout_secs: Annotated[
        float, typer.Option(min=0.1, help="Of a backend.")
    ] = DEFAULTS.connect_timeout,
    request_timeout_secs: Annotated[
        float, typer.Option(min=1.0, help="Without a byte of an answer; above max_hold_s.")
    ] = DEFAULTS.answer_timeout,
    body_timeout_secs: Annotated[
        float, typer.Option(min=0.1, help="For a request's body.")
    ] = DEFAULTS.body_timeout,
    idle_timeout_secs: Annotated[
        float, typer.Option(min=0.1, help="For a client's next request, headers included.")
    ] = DEFAULTS.idle_timeout,
    shutdown_timeout_secs: Annotated[
        float, typer.Option(min=0.0, help="For calls in flight when the router is stopped.")
    ] = DEFAULTS.shutdown_timeout,
    health_check_endpoint: Annotated[str, typer.Option()] = DEFAULTS.health_path,
    health_check_interval_secs: Annotated[float, typer.Option(min=0.1)] = DEFAULTS.health_interval,
    health_check_timeout_secs: Annotated[float, typer.Option(min=0.1)] = DEFAULTS.health_timeout,
    health_failure_threshold: Annotated[
        int, typer.Option(min=1, help="Failed probes in a row: down.")
    ] = DEFAULTS.health_failures,
    health_success_threshold: Annotated[
        int, typer.Option(min=1, help="Good probes in a row: up.")
    ] = DEFAULTS.health_successes,
    cb_failure_threshold: Annotated[
        int, typer.Option(min=1, help="Calls in a row that did not get through: a break.")
    ] = DEFAULTS.breaker_failures,
    cb_timeout_duration_secs: Annotated[
        float, typer.Option(min=0.1, help="The first break; they double.")
    ] = DEFAULTS.breaker_s,
    report_interval_secs: Annotated[
        float, typer.Option(min=0.05, help="Between two reports of an engine.")
    ] = DEFAULTS.report_interval,
) -> None:
    """Put agent sessions on many vLLM servers: each stays with its KV, and moves if that pays."""
    if policy not in PLACERS:
        raise typer.BadParameter(
            f"{policy!r} is none of {', '.join(PLACERS)}", param_hint="--policy"
        )
    if log_level not in _LEVELS:
        raise typer.BadParameter(
            f"{log_level!r} is none of {', '.join(_LEVELS)}", param_hint="--log-level"
        )
    if not backends and backends_file is None:
        raise typer.BadParameter("--backends or --backends-file is needed")
    settings = RouterSettings(
        policy=policy,
        session_headers=tuple(h.strip().lower() for h in session_headers.split(",") if h.strip()),
        tenant_header=tenant_header.strip().lower(),
        host=host,
        port=port,
        reuse_port=reuse_port,
        api_key=api_key,
        backend_api_key=backend_api_key,
        admin_api_key=admin_api_key,
        max_in_flight=max_concurrent_requests,
        max_per_backend=max_requests_per_backend,
        max_connections=_affordable(max_connections),
        max_json=max_json_mib * MiB,
        max_buffered=max_buffered_mib * MiB,
        max_sessions=max_sessions,
        session_idle=session_idle_secs,
        retries=retry_max_retries,
        connect_timeout=connect_timeout_secs,
        answer_timeout=request_timeout_secs,
        body_timeout=body_timeout_secs,
        idle_timeout=idle_timeout_secs,
        shutdown_timeout=shutdown_timeout_secs,
        health_path=health_check_endpoint,
        health_interval=health_check_interval_secs,
        health_timeout=health_check_timeout_secs,
        health_failures=health_failure_threshold,
        health_successes=health_success_threshold,
        breaker_failures=cb_failure_threshold,
        breaker_s=cb_timeout_duration_secs,
        report_interval=report_interval_secs,
    )
    # They bring much along, which takes its time to import.
    import uvloop

    from vllm_saga.router.app import Router

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    try:
        addresses = parse_list(backends)
        made = Router(settings, addresses, backends_file)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(made))
    except (AddressError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


async def _serve(made: Router) -> None:
    """Until SIGTERM or SIGINT; then calls in flight may end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with made:
        names = ", ".join(backend.name for backend in made.backends) or "none yet"
        logging.getLogger(__name__).info(
            "router on http://%s:%d, policy %s, backends: %s",
            made.settings.host, made.port, made.settings.policy, names,
        )  # fmt: skip
        # What is there now stays; looking through it and every session again stops all calls.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        await stop.wait()
        logging.getLogger(__name__).info("stopping: calls in flight may end")


def _affordable(connections: int) -> int:
    """As many files as the system allows; each connection of a client may need one to a backend."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(min(connections, (soft - _SPARE_FILES) // 2), 1)
