"""How true the simulator is: the live benchmark, predicted first and then measured.

    .venv/bin/python -m benchmarks.fidelity --model .cache/demo-model --trace FILE --overcommit 2

The cost model is fitted to the same server on the same machine (`vllm-saga simulate calibrate`),
and both ways play the same sessions with the same gaps on the same lanes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.live import report
from benchmarks.live.run import Bench, Plan, Settings, make_plan
from benchmarks.live.scale import ScaledSession
from benchmarks.live.server import Server, ServerOptions
from vllm_saga.simulator import builtin, runner, trace
from vllm_saga.simulator.calibrate import calibrate
from vllm_saga.simulator.cluster import Setup
from vllm_saga.simulator.fitting import FitReport
from vllm_saga.simulator.hardware import Hardware
from vllm_saga.simulator.placement import least_loaded
from vllm_saga.simulator.result import summarise

ARMS = {"stock": "vllm", "saga": "saga"}
console = Console()


def main(
    model: Annotated[Path, typer.Option(help="Model directory to serve.")],
    trace_file: Annotated[Path | None, typer.Option("--trace")] = None,
    overcommit: Annotated[float, typer.Option(min=0.05)] = 2.0,
    sessions: Annotated[int, typer.Option(min=1)] = 32,
    lanes: Annotated[int, typer.Option(min=1)] = 12,
    gap_scale: Annotated[float, typer.Option(help="Recorded gaps are multiplied by this.")] = 0.012,
    mean_prompt_tokens: Annotated[int, typer.Option(min=128, help="To scale to.")] = 1536,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
    output: Annotated[Path, typer.Option()] = Path("fidelity-report"),
) -> None:
    """Calibrate, predict, measure, compare."""
    settings = Settings(
        schedulers=tuple(ARMS), sessions=sessions, lanes=lanes, overcommit=overcommit,
        mean_prompt_tokens=mean_prompt_tokens, seed=seed, model=model,
        vocabulary=json.loads((model / "config.json").read_text())["vocab_size"],
        gap_scale=gap_scale, rounds=rounds,
    )  # fmt: skip
    recorded = trace.read(trace_file) if trace_file else builtin.generate("swe", 2 * sessions, seed)
    plan = make_plan(recorded, settings)
    output.mkdir(parents=True, exist_ok=True)
    machine, fit = asyncio.run(measure_machine(plan, settings, output))
    console.print(
        f"calibrated: median error {fit.median_relative_error:.1%}, "
        f"{machine.request_s * 1e3:.1f} ms a call outside the engine, "
        f"{machine.contention_s * 1e3:.1f} ms more for each other call in flight",
        highlight=False,
    )
    predicted = {arm: predict(plan, settings, machine, arm) for arm in ARMS}
    results = asyncio.run(Bench(settings, plan, output, console).run())
    measured = {
        arm: report.summarise(report.pool([r for r in results if r.scheduler == arm]))
        for arm in ARMS
    }
    document = {
        "hardware": msgspec.to_builtins(machine), "overcommit": plan.pool.overcommit,
        "predicted": predicted, "measured": measured,
    }  # fmt: skip
    (output / "fidelity.json").write_text(json.dumps(document, indent=1) + "\n")
    console.print(table(predicted, measured))


async def measure_machine(
    plan: Plan, settings: Settings, output: Path
) -> tuple[Hardware, FitReport]:
    """Fit the cost model to a stock server like the measured ones."""
    options = server_options(plan, settings)
    executable = Path(sys.executable).with_name("vllm")
    async with Server(options, "stock", output / "server-calibration.log", executable) as server:
        return await calibrate(
            server.url,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
        )


def server_options(plan: Plan, settings: Settings) -> ServerOptions:
    """The options of `Bench`'s servers."""
    return ServerOptions(
        settings.model,
        plan.pool.blocks,
        settings.block_size,
        plan.max_model_len,
        max_num_seqs=max(64, 2 * settings.lanes),
    )


def predict(plan: Plan, settings: Settings, machine: Hardware, arm: str) -> report.Json:
    """What the simulator says this arm will measure. CPU builds schedule synchronously."""
    setup = Setup(
        [as_trace(session, settings.gap_scale or 0.0) for session in plan.sessions],
        machine,
        least_loaded,
        lanes=settings.lanes,
        overlapping=False,
    )
    return summarise(runner.run_setup(setup, ARMS[arm]))


def as_trace(session: ScaledSession, gap_scale: float) -> trace.Session:
    """A scaled session in the trace format, its gaps in seconds of this machine."""
    calls = tuple(
        trace.Call(
            prompt_tokens=call.prompt_tokens,
            new_tokens=call.prompt_tokens - call.reusable_tokens,
            output_tokens=call.output_tokens,
            parent=call.parent,
            deps=call.deps,
            delay_s=call.delay_s * gap_scale,
        )
        for call in session.calls
    )
    prefix = None
    if session.prefix_group:
        prefix = trace.SharedPrefix(session.prefix_group, session.prefix_tokens)
    return trace.Session(session.session_id, calls, shared_prefix=prefix)


def table(predicted: dict[str, report.Json], measured: dict[str, report.Json]) -> Table:
    out = Table("", "predicted", "measured", "predicted / measured")
    for arm in ARMS:
        for label, *keys in (
            ("task completion, mean (s)", "task_completion_s", "mean"),
            ("step wait, mean (s)", "step_wait_s", "mean"),
            ("prefix hit rate", "prefix_hit_rate"),
        ):
            one, other = predicted[arm], measured[arm]
            for key in keys:
                one, other = one[key], other[key]
            ratio = f"{one / other:.2f}" if other else ""  # type: ignore[operator]
            out.add_row(f"{arm}: {label}", f"{one:.3f}", f"{other:.3f}", ratio)
    gain = [run["stock"]["task_completion_s"]["mean"] / run["saga"]["task_completion_s"]["mean"]
            for run in (predicted, measured)]  # fmt: skip
    out.add_row(
        "stock / saga, mean completion", *(f"{g:.2f}x" for g in gain), f"{gain[0] / gain[1]:.2f}"
    )
    return out


if __name__ == "__main__":
    typer.run(main)
