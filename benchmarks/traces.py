"""What traces cost an engine: its scheduling step with and without them, and CPU time per call.

    .venv/bin/python -m benchmarks.traces [--running 256] [--tokens 100]

Calls of known sessions decode `--tokens` tokens each; when one ends, the next one begins. One
scheduler sends its traces to a collector in another process, over gRPC. Both take turns in short
rounds. The time of one step is `schedule()` + `update_from_output()`, without the model; `cpu` is
what the engine's thread used of it, which other programs on the machine disturb less.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.overhead import prompt_of
from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler


class Engine:
    """`running` calls decode at any time."""

    def __init__(self, endpoint: str | None, running: int, tokens: int) -> None:
        self._tokens = tokens
        self._calls = 0
        self.scheduler = make_scheduler(
            _traced(endpoint),
            blocks=200_000,
            overlapping=True,
            max_num_seqs=running,
            max_num_batched_tokens=16_384,
            max_model_len=32_768,
        )
        self._driver = Driver(self.scheduler, now=1.0)
        for number in range(running):
            self._begin(1 + number * tokens // running)

    def measure(self, steps: int) -> tuple[float, float]:
        """Mean seconds of a step, by the clock and of this thread's CPU."""
        wall = cpu = 0.0
        ended = len(self._driver.finished)
        for _ in range(steps):
            for _ in range(len(self._driver.finished) - ended):
                self._begin(self._tokens)
            ended = len(self._driver.finished)
            start, start_cpu = time.perf_counter(), time.thread_time()
            self._driver.step()
            wall += time.perf_counter() - start
            cpu += time.thread_time() - start_cpu
            self._driver.now += 0.03
        return wall / steps, cpu / steps

    @property
    def ended(self) -> int:
        return len(self._driver.finished)

    def _begin(self, tokens: int) -> None:
        number = self._calls = self._calls + 1
        session = f"s{number % 4000}"
        request = make_request(f"r{number}", prompt_of(number), tokens, session_id=session)
        self._driver.add(request)


def _traced(endpoint: str | None) -> Any:
    from vllm_saga.engine.scheduler import SagaAsyncScheduler

    def make(vllm_config: Any, **arguments: Any) -> Any:
        vllm_config.observability_config.otlp_traces_endpoint = endpoint
        return SagaAsyncScheduler(vllm_config, **arguments)

    return make


def main(
    running: Annotated[int, typer.Option(help="Calls decoding.")] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens of a call's output.")] = 100,
    rounds: Annotated[int, typer.Option(help="Rounds of each scheduler.")] = 30,
    steps: Annotated[int, typer.Option(help="Steps of a round.")] = 20,
) -> None:
    """Print microseconds per step without and with traces, and what they cost beside the steps."""
    collector = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("collector.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert collector.stdout is not None
    endpoint = f"http://127.0.0.1:{int(collector.stdout.readline())}"
    engines = {"without": Engine(None, running, tokens), "with": Engine(endpoint, running, tokens)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    beside = -time.process_time() + time.thread_time()
    for round_number in range(rounds + 1):
        for name, engine in engines.items():
            measured = engine.measure(steps)
            if round_number:
                times[name].append(measured)
    engines["with"].scheduler.shutdown()
    beside += time.process_time() - time.thread_time()
    spans = collector.communicate("")[0].strip()
    for name, seconds in times.items():
        wall, cpu = (statistics.median(column) * 1e6 for column in zip(*seconds, strict=True))
        print(f"{name:>8}: {wall:8.0f} us/step, {cpu:8.0f} us of cpu")
    pairs = list(zip(times["without"], times["with"], strict=True))
    ratios = [statistics.median(on[i] / off[i] for off, on in pairs) for i in (0, 1)]
    print(f"   ratio: {ratios[0]:.3f} by the clock, {ratios[1]:.3f} of cpu ({rounds} rounds)")
    calls = engines["with"].ended
    each = beside / max(calls, 1) * 1e6
    print(f"{calls} calls ended, {spans} spans arrived; {each:.0f} us of cpu a call beside")


if __name__ == "__main__":
    typer.run(main)
