"""What a finished run comes to: its numbers, and how two policies compare on the same work.

Names and definitions are those of the live benchmark (`benchmarks/live/report.py`) wherever it has
them. Times are seconds of the virtual clock unless a name says otherwise. A number that does not
exist (a mean of nothing, a ratio to zero) is None, which JSON writes as null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from vllm_saga.simulator import ratios
from vllm_saga.simulator.ratios import Sample, Statistic, percentile
from vllm_saga.simulator.records import LiveCall, LiveSession

Json = dict[str, Any]

#: A session is on time if it takes no longer than so many times its seconds alone on an idle
#: engine (the target of the SAGA paper), and the targets reported beside it.
SLO_FACTOR = 1.5
OTHER_SLO_FACTORS = (1.2, 2.0)
#: Keys of `summarise` that depend on the machine: the only ones that differ between two runs of
#: the same configuration.
TIMING_FIELDS = ("scheduler_us_per_step", "wall_s")


@dataclass
class RunResult:
    """One policy over one workload with one seed.

    sessions: all that arrived, finished or not. isolated_s: `LiveSession.id` → seconds it takes
    alone on an idle engine; needed for every finished session. ended_s: virtual time of the end
    (the start is 0). kv_*_token_s: token-seconds, summed over replicas; capacity is all there is,
    running belongs to running calls, cached is free but still in the prefix cache, and held_hit is
    the part of cached that was later hit. schedulings: calls of the scheduler, each for one step
    or for a stretch of them. scheduler_s, wall_s: seconds of this machine's clock, in
    the scheduler and in all. timeline: (time, running tokens, cached tokens), each valid until the
    next sample.
    """

    policy: str
    seed: int
    sessions: list[LiveSession]
    isolated_s: dict[str, float]
    ended_s: float
    kv_capacity_token_s: float
    kv_running_token_s: float
    kv_cached_token_s: float
    kv_held_hit_token_s: float
    preemptions: int
    steps: int
    schedulings: int
    scheduler_s: float
    wall_s: float
    timeline: list[tuple[float, float, float]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    block_size: int = 16

    @property
    def calls(self) -> list[LiveCall]:
        """All calls that were issued, session by session."""
        return [call for session in self.sessions for call in session.calls if call is not None]


def completion_s(session: LiveSession) -> float | None:
    """From arrival to the last token of the last call; None if the session did not finish."""
    return None if session.finished_s is None else session.finished_s - session.arrival_s


def slowdown(run: RunResult, session: LiveSession) -> float | None:
    """Completion over the session's time alone; ValueError if that time is missing or zero."""
    took = completion_s(session)
    if took is None:
        return None
    alone = run.isolated_s.get(session.id, 0.0)
    if alone <= 0:
        raise ValueError(
            f"isolated_s[{session.id!r}] of policy {run.policy!r}, seed {run.seed}: "
            f"got {run.isolated_s.get(session.id)}, needs the session's seconds alone, above 0"
        )
    return took / alone


def step_waits(sessions: Iterable[LiveSession], *, first: bool = False) -> list[float]:
    """Seconds from issue to first token of answered calls: first calls, or all but those."""
    return [
        call.wait_s
        for session in sessions
        for call in session.calls
        if call is not None and call.first_token_s is not None and (call.index == 0) == first
    ]


def summarise(run: RunResult) -> Json:
    """The `runs[]` entry of one run.

    Sessions that did not finish are censored: they are in no mean and no percentile, but count as
    `unfinished` and miss every SLO. So are calls without a first token (`unanswered_calls`); the
    longest any of them had waited is `unanswered_wait_max_s`. Token counts cover the calls that
    were scheduled; `output_tokens_per_s` those that finished. ValueError if the accounts of `run`
    contradict each other.
    """
    completions = [took for s in run.sessions if (took := completion_s(s)) is not None]
    slowdowns = [slow for s in run.sessions if (slow := slowdown(run, s)) is not None]
    calls = run.calls
    waits = step_waits(run.sessions)
    unanswered = [call for call in calls if call.first_token_s is None]
    output = sum(call.spec.output_tokens for call in calls if call.finished_s is not None)
    return {
        "policy": run.policy,
        "seed": run.seed,
        "task_completion_s": spread(completions),
        "slowdown": spread(slowdowns),
        "step_wait_s": _spread_max(waits),
        "first_wait_s": _spread_max(step_waits(run.sessions, first=True)),
        "slo_attainment": _attainment(slowdowns, len(run.sessions), SLO_FACTOR),
        "tasks_per_min": _over(60 * len(completions), run.ended_s),
        "output_tokens_per_s": _over(output, run.ended_s),
        **_reuse(run),
        "kv_time": kv_time(run),
        "preemptions": run.preemptions,
        "unfinished": len(run.sessions) - len(completions),
        "scheduler_us_per_step": _over(1e6 * run.scheduler_s, run.schedulings),
        "sessions": len(run.sessions),
        "calls": len(calls),
        "unanswered_calls": len(unanswered),
        "unanswered_wait_max_s": max((run.ended_s - c.issued_s for c in unanswered), default=None),
        "worst_step_wait_s": _spread_max(
            [max(own) for session in run.sessions if (own := step_waits([session]))]
        ),
        "slo_attainment_at": {
            str(factor): _attainment(slowdowns, len(run.sessions), factor)
            for factor in OTHER_SLO_FACTORS
        },
        "steps": run.steps,
        "ended_s": run.ended_s,
        "wall_s": run.wall_s,
        **_by_tenant(run),
        "notes": run.notes,
    }


def _reuse(run: RunResult) -> Json:
    """How much of the prompts came from the prefix cache, and of what could have come."""
    prompt = cached = reusable = recomputed = 0
    for call in run.calls:
        if call.cached_tokens < 0:
            continue
        own = 0 if call.index == 0 else call.spec.reusable_tokens
        own = own // run.block_size * run.block_size
        prompt += call.spec.prompt_tokens
        cached += call.cached_tokens
        reusable += own
        recomputed += max(own - call.cached_tokens, 0)
    return {
        "prefix_hit_rate": _over(cached, prompt),
        "recomputed_tokens": recomputed,
        "reuse_efficiency": _over(reusable - recomputed, reusable),
    }


def kv_time(run: RunResult) -> Json:
    """Shares of KV memory × time by state; they add up to 1.

    ValueError if more was used than there is, or more was hit than cached.
    """
    capacity, running = run.kv_capacity_token_s, run.kv_running_token_s
    cached, hit = run.kv_cached_token_s, run.kv_held_hit_token_s
    slack = 1e-6 * capacity
    if min(running, cached, hit, cached - hit, capacity - running - cached) < -slack:
        raise ValueError(
            f"KV accounts of policy {run.policy!r}, seed {run.seed} do not add up (token-seconds): "
            f"capacity {capacity}, running {running}, cached {cached}, of that later hit {hit}"
        )
    parts = {
        "running": running,
        "held_hit": hit,
        "held_wasted": cached - hit,
        "free": capacity - running - cached,
    }
    # What is below zero now is rounding.
    parts = {state: max(part, 0.0) for state, part in parts.items()}
    total = sum(parts.values())
    return {state: _over(part, total) for state, part in parts.items()}


def _by_tenant(run: RunResult) -> Json:
    """Per tenant, and Jain's index over the tenants' mean slowdowns; empty without tenants.

    The index is None while a tenant has finished nothing: leaving it out would call that fair.
    """
    names = sorted({session.tenant for session in run.sessions})
    if not any(names):
        return {}
    tenants: Json = {}
    for name in names:
        own = [session for session in run.sessions if session.tenant == name]
        slow = [x for session in own if (x := slowdown(run, session)) is not None]
        tenants[name] = {
            "slo_attainment": _attainment(slow, len(own), SLO_FACTOR),
            "slowdown_mean": fmean(slow) if slow else None,
            "tasks": len(own),
        }
    means = [block["slowdown_mean"] for block in tenants.values()]
    jain = None if None in means else sum(means) ** 2 / (len(means) * sum(x * x for x in means))
    return {"tenants": tenants, "jain_slowdown": jain}


def spread(values: Sequence[float]) -> Json:
    """Mean and percentiles; None for no values."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    ordered = sorted(values)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {"mean": fmean(ordered)} | {k: percentile(ordered, v) for k, v in shares.items()}


def _spread_max(values: Sequence[float]) -> Json:
    return spread(values) | {"max": max(values, default=None)}


def _over(above: float, below: float) -> float | None:
    return above / below if below else None


def _attainment(slowdowns: Sequence[float], sessions: int, factor: float) -> float | None:
    return _over(sum(value <= factor for value in slowdowns), sessions)


#: Key, which sample, which number of it; baseline over policy.
_TIME_RATIOS: tuple[tuple[str, str, Statistic], ...] = (
    ("task_completion_ratio", "completion", ratios.mean),
    ("task_completion_p95_ratio", "completion", partial(ratios.quantile, share=0.95)),
    ("step_wait_mean_ratio", "wait", ratios.mean),
    ("step_wait_p99_ratio", "wait", partial(ratios.quantile, share=0.99)),
    ("slowdown_ratio", "slowdown", ratios.mean),
)
RATIOS = (*(key for key, _, _ in _TIME_RATIOS), "tasks_per_min_ratio")


def paired(baseline_runs: Sequence[RunResult], policy_runs: Sequence[RunResult]) -> Json:
    """Ratios of one policy to the baseline, on the same work: above 1 is better everywhere.

    Runs are paired by seed, sessions by `LiveSession.id`, calls by index; what only one of the two
    finished or answered is left out. `mean` is the geometric mean of the seeds' ratios, so that
    swapping the arms gives the reciprocal. `ci95` is a percentile bootstrap over sessions within
    each seed and, from `ratios.MIN_SEEDS` seeds on, over seeds too; it is widened where needed to
    hold the mean, and the same input gives the same interval. Throughput is one number per run:
    with fewer seeds it has no interval. ValueError if the runs share no seed or one appears twice.
    """
    if not baseline_runs or not policy_runs:
        raise ValueError("paired: needs at least one run of the baseline and one of the policy")
    baseline, policy = _by_seed(baseline_runs), _by_seed(policy_runs)
    seeds = sorted(baseline.keys() & policy.keys())
    if not seeds:
        raise ValueError(
            f"paired: {baseline_runs[0].policy!r} ran with seeds {sorted(baseline)} and "
            f"{policy_runs[0].policy!r} with {sorted(policy)}: none in common"
        )
    rng = np.random.default_rng(ratios.SEED)
    rows: dict[str, list[np.ndarray]] = {key: [] for key in RATIOS}
    for seed in seeds:
        base, new = baseline[seed], policy[seed]
        samples, sessions = _paired_samples(base, new)
        times = ratios.draw(sessions, rng)
        for key, name, number in _TIME_RATIOS:
            a, b = samples[name]
            rows[key].append(ratios.logs(number(a, times), number(b, times)))
        speeds = np.array([_tasks_per_s(new)]), np.array([_tasks_per_s(base)])
        rows["tasks_per_min_ratio"].append(ratios.logs(*speeds))
    out: Json = {"baseline": baseline_runs[0].policy, "policy": policy_runs[0].policy}
    for key in RATIOS:
        out[key] = ratios.estimate(rows[key], rng)
    return out | {"seeds": seeds}


def _by_seed(runs: Sequence[RunResult]) -> dict[int, RunResult]:
    out = {run.seed: run for run in runs}
    if len(out) < len(runs):
        raise ValueError(
            f"paired: policy {runs[0].policy!r} has two runs with the same seed: "
            f"{sorted(run.seed for run in runs)}"
        )
    return out


def _paired_samples(
    base: RunResult, new: RunResult
) -> tuple[dict[str, tuple[Sample, Sample]], int]:
    """The samples of both arms over the sessions both had, and the number of those."""
    others = {session.id: session for session in new.sessions}
    pairs = [(session, others[session.id]) for session in base.sessions if session.id in others]
    columns: dict[str, tuple[list[list[float]], list[list[float]]]] = {
        name: ([], []) for name in ("completion", "slowdown", "wait")
    }
    for a, b in pairs:
        both = a.finished_s is not None and b.finished_s is not None
        waits_b = {call.index: call for call in b.calls if call is not None}
        answered = [
            (call, waits_b[call.index])
            for call in a.calls
            if call is not None and call.index > 0 and call.first_token_s is not None
            if call.index in waits_b and waits_b[call.index].first_token_s is not None
        ]
        for arm, (run, session) in enumerate(((base, a), (new, b))):
            took, slow = completion_s(session), slowdown(run, session)
            columns["completion"][arm].append([took] if both and took is not None else [])
            columns["slowdown"][arm].append([slow] if both and slow is not None else [])
            columns["wait"][arm].append([pair[arm].wait_s for pair in answered])
    return {k: (Sample.of(a), Sample.of(b)) for k, (a, b) in columns.items()}, len(pairs)


def _tasks_per_s(run: RunResult) -> float:
    done = sum(session.finished_s is not None for session in run.sessions)
    return done / run.ended_s if run.ended_s else math.nan


def by_policy(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Runs of each policy by ascending seed; policies in order of first appearance."""
    out: dict[str, list[RunResult]] = {}
    for run in results:
        out.setdefault(run.policy, []).append(run)
    return {name: sorted(runs, key=lambda run: run.seed) for name, runs in out.items()}


def to_json(config: Mapping[str, Any], results: Sequence[RunResult], baseline: str) -> Json:
    """The whole report; ValueError if `baseline` is not among the policies that ran.

    Same results in, same bytes out (`json.dumps`), but for `TIMING_FIELDS`.
    """
    arms = by_policy(results)
    if baseline not in arms:
        raise ValueError(f"baseline: {baseline!r} did not run; these did: {', '.join(arms)}")
    document = {
        "config": dict(config),
        "runs": [summarise(run) for runs in arms.values() for run in runs],
        "paired": [paired(arms[baseline], runs) for name, runs in arms.items() if name != baseline],
    }
    return _plain(document)


def _plain(value: Any) -> Any:
    """Only what JSON has: NaN and infinities become None, numpy scalars Python numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
