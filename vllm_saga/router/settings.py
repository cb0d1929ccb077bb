"""What an operator may set of the router; `command.py` makes flags of it."""

from __future__ import annotations

from dataclasses import dataclass

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Times are seconds, sizes are bytes. The limits are what keeps memory bounded.

    max_in_flight, max_per_backend: calls sent and not yet ended; beyond them callers get 429.
    max_connections: of clients; what comes beyond them is closed at once.
    max_json, max_buffered: the largest JSON body that is read for identity, and of all such bodies
    together; what is larger is streamed and known by its headers only.
    body_timeout: for the whole of a body that is read, and between two parts of one that is
    streamed. idle_timeout: for a client's next request, headers included.
    answer_timeout: between two parts of an answer, so also for the longest hold and prefill.
    write_timeout: how long a client may take nothing of its answer.
    retries: how many further replicas a call may be offered to that one has refused.
    """

    policy: str = "saga"
    session_headers: tuple[str, ...] = ()
    tenant_header: str = "x-tenant-id"
    host: str = "127.0.0.1"
    port: int = 30000
    reuse_port: bool = False
    api_key: str | None = None
    backend_api_key: str | None = None
    admin_api_key: str | None = None
    max_in_flight: int = 8192
    max_per_backend: int = 1024
    max_connections: int = 16384
    max_json: int = 32 * MiB
    max_buffered: int = 1024 * MiB
    max_sessions: int = 100_000
    session_idle: float = 1800.0
    retries: int = 2
    connect_timeout: float = 5.0
    body_timeout: float = 60.0
    idle_timeout: float = 75.0
    answer_timeout: float = 1800.0
    write_timeout: float = 300.0
    shutdown_timeout: float = 30.0
    health_path: str = "/health"
    health_interval: float = 2.0
    health_timeout: float = 5.0
    health_failures: int = 3
    health_successes: int = 1
    breaker_failures: int = 5
    breaker_s: float = 10.0
    report_interval: float = 0.5
