"""From what a user asks for to finished runs: populations, loads, searches, processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import msgspec

from vllm_saga.simulator import load as loads
from vllm_saga.simulator import policies
from vllm_saga.simulator.cluster import Cluster, Setup
from vllm_saga.simulator.formats import Population, population
from vllm_saga.simulator.hardware import Hardware, call_alone_s
from vllm_saga.simulator.placement import PLACEMENTS
from vllm_saga.simulator.result import RunResult, summarise
from vllm_saga.simulator.trace import Call, Session

AUTO_CAP = "static-cap:auto"


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question: this work, on this cluster, under this load. Tokens, seconds."""

    workload: tuple[Session, ...]
    load: loads.Load
    hardware: Hardware
    count: int
    replicas: int = 1
    placement: str = "least_loaded"
    max_gap_s: float | None = None
    max_context: int | None = None
    overlapping: bool = True
    knobs: tuple[tuple[str, Any], ...] = ()

    def population(self, seed: int) -> Population:
        """The sessions of one seed, less those that the KV pool or `max_context` cannot hold."""
        longest = min(self.max_context or self.hardware.kv_tokens, self.hardware.kv_tokens)
        return population(self.workload, self.count, seed, self.max_gap_s, longest)

    def setup(self, seed: int) -> Setup:
        """Everything a cluster needs; `load` must not be `AutoOpen`."""
        sessions = self.population(seed).sessions
        lanes, arrivals = None, None
        if isinstance(self.load, loads.Closed):
            lanes = self.load.lanes
        elif isinstance(self.load, loads.Overcommit):
            lanes = self.load.lanes(sessions, self.hardware.kv_tokens * self.replicas, self._alone)
        elif isinstance(self.load, loads.Open):
            arrivals = self.load.arrivals(sessions, seed)
        else:
            raise TypeError(f"resolve {self.load} first")
        return Setup(
            sessions, self.hardware, PLACEMENTS[self.placement], lanes, arrivals,
            self.replicas, self.overlapping, knobs=dict(self.knobs),
        )  # fmt: skip

    def _alone(self, call: Call) -> float:
        return call_alone_s(
            self.hardware, call.new_tokens, call.reusable_tokens, call.output_tokens
        )


def isolated_s(session: Session, hardware: Hardware) -> float:
    """Seconds the session takes alone on an idle engine that keeps all it has computed."""
    ends: list[float] = []
    for index, call in enumerate(session.calls):
        ready = max((ends[dep] for dep in session.deps[index]), default=0.0)
        took = call_alone_s(hardware, call.new_tokens, call.reusable_tokens, call.output_tokens)
        ends.append(ready + session.delays_s[index] + took)
    return max(ends)


def run(
    experiment: Experiment,
    policy: str,
    seed: int,
    on_progress: Callable[[int, float], None] = lambda done, now: None,
) -> RunResult:
    """One policy on one seed, in this process."""
    return run_setup(experiment.setup(seed), policy, seed, on_progress)


def run_setup(
    setup: Setup,
    policy: str,
    seed: int = 0,
    on_progress: Callable[[int, float], None] = lambda done, now: None,
) -> RunResult:
    """One policy on sessions that are chosen already."""
    began = time.perf_counter()
    if policy == policies.ROOMY:
        setup = _roomy(setup)
    cluster = Cluster(setup, policies.maker(policy), on_progress)
    cluster.run()
    replicas, hardware = cluster.replicas, setup.hardware
    return RunResult(
        policy=policy,
        seed=seed,
        sessions=cluster.sessions,
        isolated_s={s.id: isolated_s(s.trace, hardware) for s in cluster.sessions},
        ended_s=cluster.now,
        kv_capacity_token_s=cluster.now * hardware.kv_tokens * len(replicas),
        kv_running_token_s=sum(r.kv_time.running for r in replicas),
        kv_cached_token_s=sum(r.kv_time.cached for r in replicas),
        kv_held_hit_token_s=sum(min(r.kv_time.held_hit, r.kv_time.cached) for r in replicas),
        preemptions=sum(r.preemptions for r in replicas),
        steps=sum(r.steps for r in replicas),
        schedulings=sum(r.schedulings for r in replicas),
        scheduler_s=sum(r.scheduler_wall_s for r in replicas),
        wall_s=time.perf_counter() - began,
        timeline=cluster.timeline,
        notes=_notes(cluster),
        block_size=hardware.block_size,
    )


def _roomy(setup: Setup) -> Setup:
    """The same on engines each of which can keep all that the sessions ever compute."""
    hardware = setup.hardware
    computed = sum(
        (call.new_tokens if index else call.prompt_tokens) + call.output_tokens
        + hardware.block_size
        for session in setup.sessions
        for index, call in enumerate(session.calls)
    )  # fmt: skip
    pool = max(computed, hardware.kv_tokens)
    return replace(setup, hardware=msgspec.structs.replace(hardware, kv_tokens=pool))


def _notes(cluster: Cluster) -> dict[str, Any]:
    """What is said of a run besides its figures.

    Of several engines: `co_location`, the share of calls that went where their session's last call
    had been; `load_max_over_mean`, of the mean numbers of calls that the engines had in flight, the
    largest over the mean; `moves`, calls that were sent to another engine than at first.
    """
    setup = cluster.setup
    notes: dict[str, Any] = {"lanes": setup.lanes} if setup.lanes else {}
    if setup.replicas == 1:
        return notes
    stayed = followed = 0
    call_s = [0.0] * setup.replicas
    for session in cluster.sessions:
        calls = [call for call in session.calls if call is not None]
        followed += len(calls) - 1
        stayed += sum(a.replica == b.replica for a, b in pairwise(calls))
        for call in calls:
            call_s[call.replica] += (call.finished_s or cluster.now) - call.submitted_s
    mean_s = fmean(call_s)
    return notes | {
        "co_location": stayed / followed if followed else None,
        "load_max_over_mean": max(call_s) / mean_s if mean_s else None,
        "moves": cluster.placement.moves,
    }


Job = tuple[Experiment, str, int]
_progress: Any = None


def run_all(
    jobs: Sequence[Job],
    processes: int,
    on_progress: Callable[[Sequence[int]], None] = lambda done: None,
) -> list[RunResult]:
    """Run jobs side by side, at most `processes` at a time; results in the order of the jobs.

    `on_progress` is told a few times a second how many sessions each job has finished.
    """
    if processes == 1 or len(jobs) < 2:
        return _run_here(jobs, on_progress)
    context = get_context("forkserver")
    counts = context.Array("l", len(jobs), lock=False)
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _init_worker, (counts,)) as pool:
        futures = [pool.submit(_work, number, *job) for number, job in enumerate(jobs)]
        while not all(future.done() for future in futures):
            on_progress(list(counts))
            for future in futures:
                if future.done():
                    future.result()
            time.sleep(0.2)
        on_progress(list(counts))
        return [future.result() for future in futures]


def _run_here(jobs: Sequence[Job], on_progress: Callable[[Sequence[int]], None]) -> list[RunResult]:
    counts = [0] * len(jobs)

    def note(number: int, done: int) -> None:
        counts[number] = done
        on_progress(counts)

    return [
        run(*job, lambda done, _now, number=number: note(number, done))  # type: ignore[misc]
        for number, job in enumerate(jobs)
    ]


def _init_worker(counts: Any) -> None:
    global _progress
    _progress = counts


def _work(number: int, experiment: Experiment, policy: str, seed: int) -> RunResult:
    def note(done: int, _now: float) -> None:
        _progress[number] = done

    return run(experiment, policy, seed, note)


def saturation_per_min(experiment: Experiment, processes: int) -> float:
    """Stock vLLM's own best throughput in sessions per minute, over closed loops of many sizes.

    Lanes from a quarter to five quarters of what the pools hold on average; seed 0.
    """
    fitting = loads.Overcommit(1.0).lanes(
        experiment.population(0).sessions, experiment.hardware.kv_tokens * experiment.replicas,
        experiment._alone,
    )  # fmt: skip
    lanes = sorted({max(1, round(fitting * share)) for share in (0.25, 0.5, 0.65, 0.8, 1.0, 1.25)})
    jobs = [(replace(experiment, load=loads.Closed(n)), policies.BASELINE, 0) for n in lanes]
    results = run_all(jobs, processes)
    return max(summarise(result)["tasks_per_min"] for result in results)


def best_static_cap(experiment: Experiment, processes: int) -> int:
    """The cap per replica with the least mean task completion on seed 0.

    A geometric grid first, then every cap between the best one's neighbours that is left.
    """
    setup = experiment.setup(0)
    fitting = loads.Overcommit(1.0).lanes(
        setup.sessions, experiment.hardware.kv_tokens, experiment._alone
    )
    most = max(2, min(4 * fitting, math.ceil(len(setup.sessions) / experiment.replicas)))
    grid = sorted({round(most ** (step / 7)) for step in range(1, 8)})
    mean = _completion_by_cap(experiment, grid, processes)
    best = min(mean, key=mean.__getitem__)
    at = grid.index(best)
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    between = range(low + 1, high)
    stride = max(1, len(between) // 6)
    mean |= _completion_by_cap(experiment, between[::stride], processes)
    return min(mean, key=mean.__getitem__)


def _completion_by_cap(
    experiment: Experiment, caps: Sequence[int], processes: int
) -> dict[int, float]:
    results = run_all([(experiment, f"static-cap:{cap}", 0) for cap in caps], processes)
    return {
        cap: summarise(result)["task_completion_s"]["mean"]
        for cap, result in zip(caps, results, strict=True)
    }
