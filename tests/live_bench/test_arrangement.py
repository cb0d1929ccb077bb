"""Names of arms, and the routers they stand for."""

import asyncio
import sys
from pathlib import Path

import pytest
import typer
from aiohttp import web
from rich.console import Console

from benchmarks.live import arrangement, routers
from benchmarks.live.__main__ import read_arms
from benchmarks.live.arrangement import Arrangement
from benchmarks.live.fleet import as_replica
from benchmarks.live.process import ServerError, free_port
from benchmarks.live.run import Bench, Settings, make_plan
from benchmarks.live.server import ServerOptions, worker_cores
from vllm_saga.simulator import builtin


@pytest.mark.parametrize("name", [*arrangement.DEFAULT, "stock", "saga", "my.own.Scheduler"])
def test_names_are_read_back(name: str) -> None:
    assert Arrangement.parse(name).name == name


@pytest.mark.parametrize("name", ["", "saga+", "+saga", "saga+nginx", "stock+vllm-router", "a+b+c"])
def test_what_is_no_arrangement_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no arrangement"):
        Arrangement.parse(name)


async def test_our_router_is_a_command_of_its_own_package() -> None:
    made = await routers.command("session", ["http://127.0.0.1:1", "http://127.0.0.1:2"], 3)
    assert made[1:] == [
        "router", "--policy", "session", "--host", "127.0.0.1", "--port", "3",
        "--backends", "http://127.0.0.1:1,http://127.0.0.1:2",
    ]  # fmt: skip
    assert routers.find_peer("session") is None


async def test_a_router_that_cannot_be_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(routers, "INSTALLED", tmp_path)
    with pytest.raises(routers.RouterUnavailable, match="vllm-router"):
        await routers.install(routers.PEERS["vllm-router"])
    assert not list(tmp_path.glob("*/complete"))


async def test_arms_without_their_router_are_skipped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(routers, "INSTALLED", tmp_path / "routers")
    (tmp_path / "config.json").write_text('{"vocab_size": 512, "max_position_embeddings": 9}')
    (tmp_path / "generation_config.json").write_text("{}")
    settings = Settings(
        ("stock+sglang-router-cache_aware",), 4, 4, 1.5, 64, 0, tmp_path, 512, replicas=2, skew=0.6
    )
    plan = make_plan(builtin.sessions(8, 0), settings)
    bench = Bench(settings, plan, tmp_path, Console(quiet=True))
    assert await bench.run() == []
    assert "sglang-router" in bench.skipped["stock+sglang-router-cache_aware"]
    assert bench.config("built-in")["skipped"] == bench.skipped
    assert sum(bench.config("built-in")["arrivals"]["work_by_hash"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "replicas", "message"),
    [
        (" , ", 1, "name at least one arm"),
        ("stock", 2, "replicas need a router"),
        ("saga+saga", 1, "a router needs --replicas"),
        ("saga+nginx", 2, "no arrangement"),
    ],
)
def test_arms_that_do_not_fit_are_refused(text: str, replicas: int, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        read_arms(text, replicas)


def test_arms_are_read_once_each() -> None:
    assert read_arms("stock, saga,stock", 1) == ("stock", "saga")


async def test_a_router_serves_when_calls_get_through(tmp_path: Path) -> None:
    """Before our real router one engine, which is up from the start and serves a little later."""
    asked = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal asked
        if request.method != "POST":
            return web.json_response({})
        asked += 1
        return web.json_response({}, status=200 if asked > 2 else 429)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = free_port()
    engine = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        made = await routers.command("round_robin", [engine], port)
        async with routers.Router("round_robin", made, port, tmp_path / "router.log") as router:
            assert router.cpu_s() > 0
            assert asked == 3
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
    finally:
        await runner.cleanup()


async def test_a_router_that_dies_says_why_and_another_s_is_no_error_of_ours(
    tmp_path: Path,
) -> None:
    script = [sys.executable, "-c", "raise SystemExit('Error: no workers')"]
    ours = routers.Router("session", script, free_port(), tmp_path / "ours.log")
    with pytest.raises(ServerError, match="Error: no workers") as caught:
        await ours.__aenter__()
    assert not isinstance(caught.value, routers.RouterUnavailable)
    other = routers.Router("vllm-router-random", script, free_port(), tmp_path / "other.log")
    with pytest.raises(routers.RouterUnavailable, match="vllm-router-random exited"):
        await other.__aenter__()


def test_replicas_differ_in_name_and_cores_only() -> None:
    options = ServerOptions(Path("model"), 100, 32, 1000, env={"KEPT": "1"})
    one, two = (as_replica(options, "saga", k, 2) for k in range(2))
    commands = [mine.command(Path("vllm"), "saga", 8000) for mine in (one, two)]
    differing = [pair for pair in zip(*commands, strict=True) if pair[0] != pair[1]]
    assert differing == [("replica-1", "replica-2")]
    assert one.env["KEPT"] == "1" and one.env["VLLM_PLUGINS"] == "saga"
    assert "VLLM_PLUGINS" not in as_replica(options, "stock", 0, 2).env


@pytest.mark.parametrize(
    ("cores", "replicas", "expected"),
    [
        (1, 1, [[0]]),
        (2, 1, [[1]]),
        (8, 1, [[1, 2, 3, 4]]),
        (1, 2, [[0], [0]]),
        (2, 2, [[0], [1]]),
        (4, 2, [[1], [2]]),
        (5, 2, [[1, 2], [3, 4]]),
        (16, 2, [[1, 2, 3, 4], [5, 6, 7, 8]]),
    ],
)
def test_replicas_have_as_many_cores(
    cores: int, replicas: int, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert [list(worker_cores(k, replicas)) for k in range(replicas)] == expected
