"""Real `vllm serve --scheduler-cls saga`: same outputs, every serving mode, hostile clients."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from benchmarks.live.process import ServerError
from benchmarks.live.server import scrape
from vllm_saga.cli import app

SYSTEM = list(range(10, 130))


async def agent(client, number: int, turns: int, ids: bool) -> list[list[int]]:
    """One session whose every prompt extends the last one; returns what was generated."""
    prompt = [*SYSTEM, *((number * 31 + i) % 400 + 20 for i in range(200))]
    generated = []
    for turn in range(turns):
        headers = {"X-Session-ID": f"agent-{number}"} if ids else None
        output = await client.generate(prompt, 12, headers=headers)
        generated.append(output)
        prompt = [*prompt, *output, *((number + turn * 17 + i) % 400 + 20 for i in range(60))]
    return generated


async def agents(client, count: int, turns: int, ids: bool = True) -> list[list[list[int]]]:
    return await asyncio.gather(*(agent(client, n, turns, ids) for n in range(count)))


@pytest.mark.smoke
async def test_greedy_outputs_are_stock_s_under_holds_and_evictions(serve):
    async with serve("stock", blocks=100) as client:
        expected = await agents(client, 12, 5)
    async with serve("saga", blocks=100) as client:
        assert await agents(client, 12, 5) == expected
        state = await client.state()
        assert state["holds"] > 0 and state["sessions"] >= 12
        assert await agents(client, 12, 5, ids=False) == expected


async def test_hostile_clients_leave_nothing_behind(serve):
    async with serve("saga", blocks=200, session_idle_s=5, max_hold_s=20) as client:
        await check_killed_client(client)
        await check_aborts(client, 500)
        await check_malformed_hints(client)
        await check_huge_session_id(client)
        await check_one_id_for_all(client, 1000)
        await asyncio.sleep(6)
        await client.state()
        state = await client.state()
        print("after all of it:", state)
        assert state["calls"] <= 1 and state["held"] == 0
        assert state["sessions"] <= 60 and state["ledger_blocks"] <= 60
        metrics = await scrape(client.http, client.server.url)
        assert metrics["vllm:num_requests_waiting"] == 0
        assert "the policy failed" not in client.log()


async def check_killed_client(client) -> None:
    script = (
        "import json, sys, urllib.request as u\n"
        "body = {'model': 'model', 'prompt': [5] * 50, 'max_tokens': 3000, 'stream': True,"
        " 'ignore_eos': True}\n"
        "r = u.Request(sys.argv[1], json.dumps(body).encode(),"
        " {'Content-Type': 'application/json', 'X-Session-ID': 'killed'})\n"
        "for line in u.urlopen(r): print(line, flush=True)\n"
    )
    url = f"{client.server.url}/v1/completions"
    process = subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE)
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    process.send_signal(signal.SIGKILL)
    process.wait()
    await wait_for_load(client, lambda running, waiting: running + waiting == 0)


async def check_aborts(client, count: int) -> None:
    calls = [
        asyncio.create_task(
            client.generate(
                [number % 400 + 20] * 300, 2500, headers={"X-Session-ID": f"abort-{number}"}
            )
        )
        for number in range(count)
    ]
    await wait_for_load(client, lambda running, waiting: running + waiting >= 0.9 * count)
    cancelled = sum(call.cancel() for call in calls)
    await asyncio.gather(*calls, return_exceptions=True)
    assert cancelled >= 0.9 * count
    await wait_for_load(client, lambda running, waiting: running + waiting == 0)


async def wait_for_load(client, reached) -> None:
    for _ in range(300):
        metrics = await scrape(client.http, client.server.url)
        if reached(metrics["vllm:num_requests_running"], metrics["vllm:num_requests_waiting"]):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the server's load is not what it should be within 30 s")


async def check_malformed_hints(client) -> None:
    for hints in (
        {"saga_last": "perhaps"},
        {"saga_last": [1, 2]},
        {"saga_parent": 12},
        {"saga_parent": ""},
        {"session_id": 7},
        {"saga_unknown": "x"},
    ):
        async with await client.complete([1, 2, 3], 2, vllm_xargs=hints) as answer:
            text = await answer.text()
            assert answer.status == 200 or (answer.status == 400 and "error" in json.loads(text))
    async with await client.complete([1, 2, 3], 2, vllm_xargs="not an object") as answer:
        assert answer.status == 400 and "vllm_xargs" in await answer.text()


async def check_huge_session_id(client) -> None:
    await client.generate([1, 2, 3], 2, session_id="x" * 1_000_000)
    await client.generate([1, 2, 3], 2, headers={"X-Session-ID": "y" * 1_000_000})


async def check_one_id_for_all(client, count: int) -> None:
    async def call(number: int) -> None:
        prompt = [number % 400 + 20, number // 400 + 20, *SYSTEM[:60]]
        await client.generate(prompt, 2, headers={"X-Session-ID": "everybody"})

    await asyncio.gather(*(call(n) for n in range(count)))


async def test_priority_scheduling_and_two_api_servers(serve):
    flags = ("--scheduling-policy", "priority", "--api-server-count", "2")
    async with serve("saga", *flags, blocks=100) as client:
        calls = [agent(client, n, 3, ids=True) for n in range(8)]
        urgent = [client.generate([n + 20] * 100, 4, priority=-1) for n in range(8)]
        await asyncio.gather(*calls, *urgent)
        assert (await client.state())["holds"] > 0


async def test_data_parallel(serve):
    # The default binding gives each rank cores of its own.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "auto"}
    async with serve("saga", "--data-parallel-size", "2", blocks=100, env=env) as client:
        await agents(client, 8, 3)
        assert client.log().count("saga: on,") == 2


async def test_without_prefix_caching_it_says_so_and_serves(serve):
    # The dotted spelling needs no plugin entry point.
    scheduler = "vllm_saga.SagaScheduler"
    async with serve(scheduler, "--no-enable-prefix-caching", blocks=100) as client:
        await agents(client, 4, 2)
        assert "saga: prefix caching is off" in client.log()


async def test_a_bad_setting_stops_the_server_and_is_named(serve, tmp_path):
    with pytest.raises(ServerError):
        async with serve("saga", headroom=3):
            pass
    log = (tmp_path / "saga.log").read_text()
    assert "headroom = 3: Input should be less than or equal to 0.5" in log


async def test_what_agents_do_is_learned_and_outlives_the_server(serve, tmp_path):
    file = tmp_path / "graph.json"
    call = '<tool_call>{"name": "run_tests", "arguments": {}}</tool_call>'
    async with serve("saga", graph_path=str(file)) as client:
        for session in range(2):
            prompt = [session] * 80
            for turn in range(3):
                hint = {"session_id": f"s{session}", "expected_gap_s": 0.1, "steps_left": 2 - turn}
                output = await client.generate(
                    prompt,
                    200,
                    ignore_eos=False,
                    structured_outputs={"choice": [call]},
                    vllm_xargs={"agent_hint": json.dumps(hint)},
                )
                prompt = [*prompt, *output, 7, 8]
        state = await client.state()
        assert state["hints_accepted"] == 6
    shown = CliRunner().invoke(app, ["graph", "show", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "run_tests" in shown.output
