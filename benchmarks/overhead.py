"""What a scheduling step costs with saga, beside stock, on vLLM's real scheduler.

    .venv/bin/python -m benchmarks.overhead [--running 256] [--waiting 2000]
    .venv/bin/python -m benchmarks.overhead --waiting 0 --idle 1000

Steady decode with a full waiting queue; every request is a call of a known session. With `--idle`,
so many workflows are between two calls, their KV fills the pool, and every step evicts some of it.
Both schedulers take turns in short rounds, so that a noisy machine disturbs both alike. The time of
one step is `schedule()` + `update_from_output()`, without the model.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import typer

from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import BLOCK_SIZE, make_scheduler

PROMPT_TOKENS = 512


def prepare(
    kind: str, running: int, waiting: int, idle: int, blocks: int, overlapping: bool
) -> Driver:
    """A scheduler with `running` calls decoding, `waiting` more that cannot run yet, and `idle`
    workflows that have made a call.
    """
    scheduler = make_scheduler(
        kind,
        blocks=blocks,
        overlapping=overlapping,
        max_num_seqs=running,
        max_num_batched_tokens=16_384,
        max_model_len=32_768,
    )
    driver = Driver(scheduler)
    for number in range(idle):
        driver.add(make_request(f"i{number}", prompt_of(number), 1, session_id=f"i{number}"))
        driver.drain(100)
        driver.now += 0.03
    for number in range(idle, idle + running + waiting):
        driver.add(make_request(f"r{number}", prompt_of(number), 20_000, session_id=f"s{number}"))
    while len(scheduler.running) < running:
        driver.step()
    return driver


def prompt_of(number: int) -> list[int]:
    """The token ids of the prompt of the call with this number."""
    return [(number * 7919 + i * (1 + number // 500)) % 500 for i in range(PROMPT_TOKENS)]


def measure(driver: Driver, steps: int) -> float:
    """Mean seconds of a step."""
    start = time.perf_counter()
    for _ in range(steps):
        driver.step()
        driver.now += 0.03
    return (time.perf_counter() - start) / steps


def main(
    running: Annotated[int, typer.Option(help="Calls decoding.")] = 256,
    waiting: Annotated[int, typer.Option(help="Calls waiting.")] = 2000,
    idle: Annotated[int, typer.Option(help="Workflows between two calls.")] = 0,
    blocks: Annotated[
        int | None, typer.Option(help="KV blocks of 16 tokens; 200,000, or what --idle fills.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each scheduler.")] = 15,
    steps: Annotated[int, typer.Option(help="Steps of a round.")] = 20,
    overlapping: Annotated[bool, typer.Option(help="Use the asynchronous scheduler.")] = True,
) -> None:
    """Print microseconds per step of both schedulers and their ratio."""
    if blocks is None:
        per_call = PROMPT_TOKENS // BLOCK_SIZE + 1
        blocks = (idle + running) * per_call if idle else 200_000
    drivers = {
        kind: prepare(kind, running, waiting, idle, blocks, overlapping)
        for kind in ("stock", "saga")
    }
    times: dict[str, list[float]] = {"stock": [], "saga": []}
    for round_number in range(rounds + 1):
        for kind, driver in drivers.items():
            seconds = measure(driver, steps)
            if round_number:
                times[kind].append(seconds)
    ratios = [saga / stock for stock, saga in zip(times["stock"], times["saga"], strict=True)]
    for kind, seconds in times.items():
        print(f"{kind:>6}: {statistics.median(seconds) * 1e6:8.0f} us/step")
    print(f" ratio: {statistics.median(ratios):.3f} (median of {rounds} paired rounds)")
    state = drivers["saga"].scheduler.saga.state()
    print(f"running {running}, waiting {waiting}, idle {idle}, blocks {blocks}; saga: {state}")


if __name__ == "__main__":
    typer.run(main)
