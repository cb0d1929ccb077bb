"""Ordinary traffic by `vllm bench serve`: two stock servers and saga take turns, one at a time.

The second stock server is the control: what it differs from the first is noise.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import random
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from benchmarks.equivalence import ratios
from benchmarks.live.process import ServerError
from benchmarks.live.server import Server, tiny_server

ARMS = {"stock": "stock", "saga": "saga", "control": "stock"}
LOADS = (0.5, 0.8, 1.0)
SINGLE, TURNS = "single-turn", "multi-turn"
#: Of all processes of the server, seconds for each request: what others on the machine do hardly
#: changes it.
CPU = "cpu_s"
#: Metric of `vllm bench serve`, and CPU -> what it is called here.
METRICS = {
    "request_throughput": "requests/s",
    "mean_ttft_ms": "mean TTFT",
    "median_ttft_ms": "median TTFT",
    "p99_ttft_ms": "p99 TTFT",
    "mean_itl_ms": "mean ITL",
    CPU: "CPU/request",
}
#: Mean lengths in tokens, the ratio of ShareGPT's; a tiny model on two cores bears a few hundred.
_INPUT, _OUTPUT, _SPREAD = 220, 96, 0.8
#: Of a conversation: characters, of which each is at most one token.
_QUESTION, _TURNS, _LETTERS = 80, 4, "abcdefghijklmnopqrstuvwxyz "
_BLOCKS = 768
#: Conversations whose turns mix.
_AT_A_TIME = 12
_ROUNDS_A_START = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """rounds: times that each arm meets each load. seconds: for which requests come each time.

    saturating: requests sent at once, to measure what stock can carry.
    """

    model: Path
    output: Path
    rounds: int
    seconds: float
    saturating: int
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """What one arm did in one round: the values of METRICS."""

    kind: str
    load: float
    round: int
    arm: str
    values: Mapping[str, float]


class Bench:
    """`vllm bench serve` against several servers, in one process that has vLLM loaded for all runs.

    What it says is kept in `log`. A context manager: the process ends with it.
    """

    def __init__(self, plan: Plan, log: Path) -> None:
        self._plan, self._log = plan, log
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _keep_output, (str(log),)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown(cancel_futures=True)

    async def measure(
        self, server: Server, kind: str, requests: int, rate: float, seed: int
    ) -> dict[str, float]:
        """METRICS of `requests` requests, of which `rate` come a second (inf: all at once).

        Raises:
            ServerError: a request has failed.
        """
        words = [
            "--base-url", server.url, "--backend", "openai", "--model", str(self._plan.model),
            "--served-model-name", "model", "--num-prompts", str(requests), "--request-rate",
            str(rate), "--seed", str(seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm",
            "--percentile-metrics", "ttft,itl", "--metric-percentiles", "99",
            *self._data(kind, requests, seed),
        ]  # fmt: skip
        loop = asyncio.get_running_loop()
        used_s = server.cpu_s()
        told = await loop.run_in_executor(self._process, _bench_serve, words)
        used_s = server.cpu_s() - used_s
        if told["completed"] != requests:
            raise ServerError(f"{requests - told['completed']} requests failed; log: {self._log}")
        return {CPU: used_s / requests} | {n: float(told[n]) for n in METRICS if n != CPU}

    def _data(self, kind: str, requests: int, seed: int) -> list[str]:
        if kind == SINGLE:
            lengths = {"input-len": _INPUT, "output-len": _OUTPUT, "range-ratio": _SPREAD}
            flags = ((f"--random-{name}", str(value)) for name, value in lengths.items())
            return ["--dataset-name", "random", *itertools.chain.from_iterable(flags)]
        path = self._plan.output / f"{kind}.json"
        path.write_text(json.dumps(conversations(requests, seed)))
        return ["--dataset-name", "sharegpt", "--dataset-path", str(path), "--disable-shuffle"]


def _keep_output(log: str) -> None:
    """Of this process all output goes to a file from now on."""
    kept = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(kept, stream)


def _bench_serve(words: Sequence[str]) -> dict[str, Any]:
    """The result of `vllm bench serve WORDS`."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    print(f"vllm bench serve {shlex.join(words)}", flush=True)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    result: dict[str, Any] = main(parser.parse_args(list(words)))
    return result


def conversations(requests: int, seed: int) -> list[dict[str, Any]]:
    """So many turns of conversations as ShareGPT's files have them: a prompt, and its completion.

    A turn's prompt has all that was said before. Its turns are `_AT_A_TIME` requests apart, others'
    are between them. No prompt exceeds the 1,024 tokens to which `vllm bench serve` keeps.
    """
    source = random.Random(f"conversations-{seed}")

    def say(mean: int) -> str:
        length = source.randint(mean // 2, mean * 3 // 2)
        return "".join(source.choice(_LETTERS) for _ in range(length))

    rows: list[dict[str, Any]] = []
    while len(rows) < requests:
        histories = [""] * _AT_A_TIME
        for _ in range(_TURNS):
            for number, before in enumerate(histories):
                prompt = f"{before}user: {say(_QUESTION)}\nassistant: "
                answer = say(_OUTPUT)
                rows.append({"conversations": [{"value": prompt}, {"value": answer}]})
                histories[number] = f"{prompt}{answer}\n"
    return rows[:requests]


async def run(plan: Plan, say: Say) -> tuple[dict[str, float], list[Cell]]:
    """What stock can carry of each kind (requests/s, in the mean of the starts), and every cell.

    Cells are also in `cells.jsonl` as soon as they are measured. Servers are started anew for each
    kind and every `_ROUNDS_A_START` rounds: a process keeps a speed of its own while it lives.

    Raises:
        ServerError: a server does not serve, or a request has failed.
    """
    plan.output.mkdir(parents=True, exist_ok=True)
    capacity: dict[str, list[float]] = {SINGLE: [], TURNS: []}
    cells: list[Cell] = []
    seeds = itertools.count(10_000 * (plan.seed + 1))
    with (
        Bench(plan, plan.output / "bench.log") as bench,
        (plan.output / "cells.jsonl").open("w", buffering=1) as kept,
    ):
        for kind, first in itertools.product(capacity, range(0, plan.rounds, _ROUNDS_A_START)):
            rounds = range(first, min(first + _ROUNDS_A_START, plan.rounds))
            async with _servers(plan, plan.output / f"{kind}-{first + 1}", say) as servers:
                start = Start(plan, bench, servers, kind, seeds)
                carried = await start.capacity()
                say(f"{kind}: stock carries {carried:.2f} requests/s")
                capacity[kind].append(carried)
                async for cell in start.cells(carried, rounds, say):
                    cells.append(cell)
                    kept.write(json.dumps(asdict(cell)) + "\n")
    return {kind: fmean(found) for kind, found in capacity.items()}, cells


@dataclass(frozen=True)
class Start:
    """Fresh servers of every arm, for one kind of traffic."""

    plan: Plan
    bench: Bench
    servers: Mapping[str, Server]
    kind: str
    seeds: itertools.count[int]

    async def capacity(self) -> float:
        """Requests/s of the stock servers when all come at once; every server is warm then."""
        infinite = float("inf")
        few, many = max(self.plan.saturating // 4, 4), self.plan.saturating
        seed, found = next(self.seeds), {}
        for arm, server in self.servers.items():
            await self.bench.measure(server, self.kind, few, infinite, next(self.seeds))
            found[arm] = await self.bench.measure(server, self.kind, many, infinite, seed)
        return fmean(found[arm]["request_throughput"] for arm in ("stock", "control"))

    async def cells(self, capacity: float, rounds: range, say: Say) -> AsyncIterator[Cell]:
        """Each load (of what stock carries, requests/s) in each round, by each arm."""
        for number, load in itertools.product(rounds, LOADS):
            rate, seed = load * capacity, next(self.seeds)
            requests = max(round(rate * self.plan.seconds), 8)
            for arm in turn(number + LOADS.index(load)):
                server = self.servers[arm]
                values = await self.bench.measure(server, self.kind, requests, rate, seed)
                yield Cell(self.kind, load, number, arm, values)
            say(f"{self.kind}: round {number + 1} of {self.plan.rounds}, load {load:.0%}")


@asynccontextmanager
async def _servers(plan: Plan, logs: Path, say: Say) -> AsyncIterator[dict[str, Server]]:
    """A server of each arm, its log in `logs`."""
    options = tiny_server(
        plan.model, _BLOCKS, "--load-format", "safetensors",
        max_num_seqs=32, max_num_batched_tokens=2048, stream_interval=1,
    )  # fmt: skip
    vllm = Path(sys.executable).with_name("vllm")
    servers = {}
    async with AsyncExitStack() as stack:
        for arm, scheduler in ARMS.items():
            say(f"starting {arm}")
            server = Server(options, scheduler, logs / f"{arm}.log", vllm)
            servers[arm] = await stack.enter_async_context(server)
        yield servers


def turn(number: int) -> Sequence[str]:
    """The arms, another one first each time: a machine gets warmer, or busier."""
    arms = tuple(ARMS)
    first = number % len(arms)
    return arms[first:] + arms[:first]


def compared(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, ratios.Ratio]]]:
    """{"KIND, LOAD" or "all": {metric: {"saga": saga / stock, "control": stock again / stock}}}.

    saga's reference is the middle of both stock arms.
    """
    groups: dict[str, list[Cell]] = {"all": list(cells)}
    for cell in cells:
        groups.setdefault(f"{cell.kind}, {cell.load:.0%}", []).append(cell)
    return {name: {m: _compare(members, m) for m in METRICS} for name, members in groups.items()}


def _compare(cells: Sequence[Cell], metric: str) -> dict[str, ratios.Ratio]:
    by_arm: dict[str, list[float]] = {}
    for arm in ARMS:
        own = sorted((c.kind, c.load, c.round, c.values[metric]) for c in cells if c.arm == arm)
        by_arm[arm] = [value for *_, value in own]
    stock, control = by_arm["stock"], by_arm["control"]
    return {
        "saga": ratios.ratio(by_arm["saga"], ratios.middle(stock, control)),
        "control": ratios.ratio(control, stock),
    }
