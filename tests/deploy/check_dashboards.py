"""Asks a real Prometheus every query of the dashboards, while agents press a real server.

One `vllm serve --scheduler-cls saga` and the router before it, on this machine's CPU, with more
agents than its KV pool can hold. Run by scripts/check-dashboards; prints what each query returned.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from deploy_files import ALERTS, DASHBOARDS, queries, rules

from benchmarks.live.arrangement import Arrangement
from benchmarks.live.fleet import Fleet
from benchmarks.live.process import Process, free_port
from benchmarks.live.server import tiny_server

MODEL = Path(__file__).parents[2] / ".cache" / "tiny-model"
AGENTS = 12
WITHIN_S = 240.0
SCRAPE_S = 1
RATE_S = 30
OPTIONS = tiny_server(MODEL, 200)


class Prometheus(Process):
    """A Prometheus that scrapes `urls` and evaluates the alert rules."""

    def __init__(self, executable: str, urls: Sequence[str], folder: Path) -> None:
        port = free_port()
        targets = [url.removeprefix("http://") for url in urls]
        config = folder / "prometheus.yaml"
        settings = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "saga", "static_configs": [{"targets": targets}]}],
        }
        config.write_text(yaml.safe_dump(settings))
        command = [
            executable,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        super().__init__("prometheus", command, port, folder / "prometheus.log")

    def launch(self) -> None:
        self.start({})

    async def wait_until_ready(self) -> None:
        async def ready(http: aiohttp.ClientSession) -> str | None:
            async with http.get(f"{self.url}/-/ready") as answer:
                return None if answer.status == 200 else f"HTTP {answer.status}"

        await self.ask_until_served(ready, 60.0)

    async def ask(self, http: aiohttp.ClientSession, path: str, **query: str) -> Any:
        async with http.get(f"{self.url}/api/v1/{path}", params=query) as answer:
            told = json.loads(await answer.text())
        if told["status"] != "success":
            raise ValueError(f"{query}: {told['error']}")
        return told["data"]

    async def values(self, http: aiohttp.ClientSession, query: str) -> list[float]:
        """What a query returns now; numbers only."""
        filled = query.replace("$__rate_interval", f"{RATE_S}s")
        for name in ("model", "instance", "engine"):
            filled = filled.replace(f'"${name}"', '".*"')
        data = await self.ask(http, "query", query=filled)
        found = (float(series["value"][1]) for series in data["result"])
        return [value for value in found if math.isfinite(value)]


async def run_agents(http: aiohttp.ClientSession, url: str) -> None:
    """Agents of two tenants, each doing one task after another, until cancelled."""
    numbers = itertools.count()

    async def agent() -> None:
        while True:
            number = next(numbers)
            prompt = [number % 400 + 50] * 700
            for turn in range(5):
                body = {
                    "model": "model",
                    "prompt": prompt,
                    "max_tokens": 48,
                    "ignore_eos": True,
                    "return_token_ids": True,
                    "cache_salt": f"tenant-{number % 2}",
                    "vllm_xargs": {
                        "agent_hint": json.dumps({"expected_gap_s": 0.2}),
                        **({"saga_last": 1} if turn == 4 else {}),
                    },
                }
                headers = {"X-Session-ID": f"task-{number}"}
                async with http.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
                    told = json.loads(await answer.text())
                    if answer.status != 200:
                        raise RuntimeError(f"HTTP {answer.status}: {told}")
                prompt = [*prompt, *told["choices"][0]["token_ids"], *[turn + 5] * 200]
                await asyncio.sleep(0.2)

    await asyncio.gather(*(agent() for _ in range(AGENTS)))


async def ask_all(prometheus: Prometheus, http: aiohttp.ClientSession, agents: asyncio.Task) -> int:
    """Ask until every query has returned numbers; how many have not in time."""
    left = [(path.stem, *query) for path in DASHBOARDS for query in queries(path)]
    asked, deadline = len(left), time.monotonic() + WITHIN_S
    while left and time.monotonic() < deadline:
        await asyncio.sleep(5.0)
        if agents.done():
            agents.result()
        still = []
        for board, title, query in left:
            if values := await prometheus.values(http, query):
                print(f"{board}: {title}: {', '.join(f'{v:.4g}' for v in values)}")
            else:
                still.append((board, title, query))
        left = still
    for board, title, query in left:
        print(f"NO DATA: {board}: {title}: {query}")
    print(f"{asked - len(left)} of {asked} queries return data")
    return len(left)


async def check_rules(prometheus: Prometheus, http: aiohttp.ClientSession) -> int:
    """How many alert rules Prometheus could not evaluate."""
    groups = (await prometheus.ask(http, "rules"))["groups"]
    told = [rule for group in groups for rule in group["rules"]]
    bad = [rule for rule in told if rule["health"] != "ok"]
    for rule in bad:
        print(f"BAD RULE: {rule['name']}: {rule.get('lastError')}")
    firing = [rule["name"] for rule in told if rule["state"] == "firing"]
    print(f"{len(told) - len(bad)} of {len(rules())} rules evaluated; firing: {firing or 'none'}")
    return len(bad) + abs(len(told) - len(rules()))


async def check(executable: str, folder: Path) -> int:
    fleet = Fleet(Arrangement.parse("saga+saga"), OPTIONS, [free_port()], folder / "server.log")
    timeout = aiohttp.ClientTimeout(total=600)
    async with fleet, aiohttp.ClientSession(timeout=timeout) as http:
        urls = [fleet.url, *(server.url for server in fleet.servers)]
        async with Prometheus(executable, urls, folder) as prometheus:
            agents = asyncio.create_task(run_agents(http, fleet.url))
            try:
                missing = await ask_all(prometheus, http, agents)
                return missing + await check_rules(prometheus, http)
            finally:
                agents.cancel()


def main() -> int:
    tools = [shutil.which(name) for name in ("prometheus", "promtool")]
    if not all(tools):
        print("needs prometheus and promtool on the PATH: apt-get install prometheus")
        return 2
    prometheus, promtool = map(str, tools)
    subprocess.run([promtool, "check", "rules", str(ALERTS)], check=True)
    tests = ALERTS.with_name("alerts_test.yaml")
    subprocess.run([promtool, "test", "rules", tests.name], check=True, cwd=tests.parent)
    with tempfile.TemporaryDirectory(prefix="saga-dashboards-") as folder:
        return int(asyncio.run(check(prometheus, Path(folder))) > 0)


if __name__ == "__main__":
    sys.exit(main())
