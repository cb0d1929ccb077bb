"""From finished runs to numbers: hand-computed examples, and what must hold for every run."""

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from finished_runs import document, drawn, run, session
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.simulator import ratios, result

KEYS = [
    "policy",
    "seed",
    "task_completion_s",
    "slowdown",
    "step_wait_s",
    "first_wait_s",
    "slo_attainment",
    "tasks_per_min",
    "output_tokens_per_s",
    "prefix_hit_rate",
    "recomputed_tokens",
    "reuse_efficiency",
    "kv_time",
    "preemptions",
    "unfinished",
    "scheduler_us_per_step",
]
SPREAD = ["mean", "p50", "p95", "p99"]
RATIOS = {
    "task_completion_ratio",
    "task_completion_p95_ratio",
    "step_wait_mean_ratio",
    "step_wait_p99_ratio",
    "tasks_per_min_ratio",
    "slowdown_ratio",
}


def strictly(document: Any) -> str:
    """As JSON; ValueError if it holds a NaN or an infinity."""
    return json.dumps(document, allow_nan=False)


# -- one run


def two_sessions() -> list[Any]:
    """Completion 11 s (three calls) and 20 s (two calls); each runs 2 s per call."""
    return [
        session(0, [1, 1, 3], service=2, cached=[0, 96, 272]),
        session(1, [6, 10], service=2, arrival=5, cached=[16, 200]),
    ]


def test_keys_are_exactly_these_and_then_extras() -> None:
    summary = result.summarise(run(two_sessions()))
    assert list(summary)[: len(KEYS)] == KEYS
    assert list(summary["task_completion_s"]) == list(summary["slowdown"]) == SPREAD
    assert list(summary["step_wait_s"]) == list(summary["first_wait_s"]) == [*SPREAD, "max"]
    assert list(summary["kv_time"]) == ["running", "held_hit", "held_wasted", "free"]
    assert set(result.TIMING_FIELDS) < set(summary)


def test_times_of_a_run() -> None:
    summary = result.summarise(run(two_sessions()))
    assert summary["task_completion_s"] == pytest.approx(
        {"mean": 15.5, "p50": 15.5, "p95": 11 + 0.95 * 9, "p99": 11 + 0.99 * 9}
    )
    assert summary["slowdown"]["mean"] == pytest.approx(1.55)
    # 1, 3 and 10 s: the steps; 1 and 6 s: the first calls
    assert summary["step_wait_s"] == pytest.approx(
        {"mean": 14 / 3, "p50": 3, "p95": 3 + 0.9 * 7, "p99": 3 + 0.98 * 7, "max": 10}
    )
    assert summary["first_wait_s"]["mean"] == pytest.approx(3.5)
    assert summary["first_wait_s"]["max"] == 6
    # each session's worst step: 3 and 10
    assert summary["worst_step_wait_s"]["mean"] == pytest.approx(6.5)
    # slowdowns 1.1 and 2.0
    assert summary["slo_attainment"] == 0.5
    assert summary["slo_attainment_at"] == {"1.2": 0.5, "2.0": 1.0}
    assert summary["tasks_per_min"] == 2
    assert summary["output_tokens_per_s"] == pytest.approx(50 / 60)
    assert summary["scheduler_us_per_step"] == pytest.approx(100)
    assert summary["preemptions"] == 3


def test_reuse_counts_whole_blocks_and_never_the_first_call() -> None:
    summary = result.summarise(run(two_sessions()))
    # Prompts 100, 200, 300 and 100, 200. Reusable 160 and 260 (256 in blocks); then 160.
    assert summary["prefix_hit_rate"] == pytest.approx((96 + 272 + 16 + 200) / 900)
    # 160 - 96; the second session's 200 cached tokens are more than it had computed.
    assert summary["recomputed_tokens"] == 64
    assert summary["reuse_efficiency"] == pytest.approx((96 + 256 + 160) / (160 + 256 + 160))


def test_block_size_is_the_runs() -> None:
    sessions = [session(0, [1, 1], cached=[0, 0], prompt=100, new=40)]
    assert result.summarise(run(sessions, block_size=128))["recomputed_tokens"] == 128
    assert result.summarise(run(sessions, block_size=256))["recomputed_tokens"] == 0


def test_kv_time() -> None:
    assert result.summarise(run(two_sessions()))["kv_time"] == pytest.approx(
        {"running": 0.5, "held_hit": 0.1, "held_wasted": 0.2, "free": 0.2}
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_running_token_s": 701.0},
        {"kv_held_hit_token_s": 301.0},
        {"kv_cached_token_s": -1.0, "kv_held_hit_token_s": -1.0},
    ],
)
def test_contradicting_kv_accounts_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"KV accounts of policy 'stock', seed 0 do not add up"):
        result.summarise(run(two_sessions(), **wrong))


def test_unfinished_sessions_are_censored() -> None:
    """They are in no mean, but miss the SLO; their answered calls count."""
    sessions = [*two_sessions(), session(2, [1, 2, None], service=2)]
    summary = result.summarise(run(sessions))
    assert summary["unfinished"] == 1
    assert summary["task_completion_s"]["mean"] == pytest.approx(15.5)
    assert summary["slowdown"]["mean"] == pytest.approx(1.55)
    assert summary["slo_attainment"] == pytest.approx(1 / 3)
    assert summary["tasks_per_min"] == 2
    assert summary["step_wait_s"]["mean"] == pytest.approx(16 / 4)
    assert summary["unanswered_calls"] == 1
    # issued after 1 + 2 + 2 + 2 s, and the run ended after 60
    assert summary["unanswered_wait_max_s"] == 53


def test_a_call_in_the_middle_of_its_output_is_answered_but_makes_no_tokens() -> None:
    sessions = [session(0, [1, 2], output=30)]
    last = sessions[0].calls[1]
    assert last is not None
    last.finished_s = sessions[0].finished_s = None
    summary = result.summarise(run(sessions))
    assert summary["step_wait_s"]["max"] == 2
    assert summary["output_tokens_per_s"] == 0.5
    assert summary["unanswered_calls"] == 0


def test_a_run_without_anything_has_no_numbers_and_no_nan() -> None:
    nothing = run([], ended_s=0.0, steps=0, schedulings=0, kv_capacity_token_s=0.0)
    for name in ("kv_running_token_s", "kv_cached_token_s", "kv_held_hit_token_s"):
        setattr(nothing, name, 0.0)
    summary = result.summarise(nothing)
    assert summary["task_completion_s"] == dict.fromkeys(SPREAD)
    assert summary["step_wait_s"] == dict.fromkeys([*SPREAD, "max"])
    assert summary["kv_time"]["running"] is None
    assert summary["tasks_per_min"] is None and summary["slo_attainment"] is None
    strictly(summary)


def test_missing_isolated_time_names_the_session() -> None:
    with pytest.raises(ValueError, match=r"isolated_s\['t1'\] of policy 'stock', seed 0: got None"):
        result.summarise(run(two_sessions(), isolated_s={"t0": 10.0}))
    unfinished = [session(0, [None])]
    assert result.summarise(run(unfinished, isolated_s={}))["unfinished"] == 1


def test_tenants() -> None:
    sessions = [
        session(0, [9], tenant="a"),  # 10 s: slowdown 1
        session(1, [19], tenant="a"),  # 20 s: 2
        session(2, [29], tenant="b"),  # 30 s: 3
        session(3, [None], tenant="b"),
    ]
    summary = result.summarise(run(sessions))
    assert summary["tenants"] == {
        "a": {"slo_attainment": 0.5, "slowdown_mean": 1.5, "tasks": 2},
        "b": {"slo_attainment": 0.0, "slowdown_mean": 3.0, "tasks": 2},
    }
    assert summary["jain_slowdown"] == pytest.approx(4.5**2 / (2 * (1.5**2 + 3**2)))
    assert "tenants" not in result.summarise(run(two_sessions()))


def test_a_starved_tenant_leaves_no_fairness_index() -> None:
    sessions = [session(0, [9], tenant="a"), session(1, [None], tenant="b")]
    summary = result.summarise(run(sessions))
    assert summary["tenants"]["b"]["slowdown_mean"] is None
    assert summary["jain_slowdown"] is None


@given(
    capacity=st.floats(1.0, 1e12),
    running=st.floats(0, 1),
    cached=st.floats(0, 1),
    hit=st.floats(0, 1),
    rounding=st.floats(-1e-9, 1e-9),
)
def test_kv_shares_add_up_to_one(
    capacity: float, running: float, cached: float, hit: float, rounding: float
) -> None:
    used = capacity * running
    held = (capacity - used) * cached
    shares = result.kv_time(
        run(
            [],
            kv_capacity_token_s=capacity,
            kv_running_token_s=used + capacity * rounding,
            kv_cached_token_s=held,
            kv_held_hit_token_s=held * hit,
        )
    )
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in shares.values())


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_percentile_stays_within_its_values_and_spread_is_ordered(
    values: list[float], share: float
) -> None:
    assert min(values) <= ratios.percentile(sorted(values), share) <= max(values)
    spread = result.spread(values)
    assert spread["p50"] <= spread["p95"] <= spread["p99"] <= max(values)


# -- two policies


def arm(policy: str, factor: float, seeds: int = 1, sessions: int = 8) -> list[Any]:
    """The same work under `policy`, everything `factor` times as slow."""
    return [
        run(
            [
                session(k, [factor * (1 + (k * 7 + seed) % 5)] * 3, service=factor)
                for k in range(sessions)
            ],
            policy,
            seed,
            ended_s=60.0 * factor,
        )
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_twice_as_fast_is_two_everywhere(seeds: int) -> None:
    out = result.paired(arm("stock", 2, seeds), arm("saga", 1, seeds))
    assert (out["baseline"], out["policy"]) == ("stock", "saga")
    assert set(out) == {"baseline", "policy", "seeds"} | RATIOS
    for key in RATIOS:
        assert out[key]["mean"] == pytest.approx(2), key
        low, high = out[key]["ci95"]
        if key == "tasks_per_min_ratio" and seeds < ratios.MIN_SEEDS:
            assert low is None and high is None
        else:
            # every session is twice as fast, so every resample says so
            assert low == pytest.approx(2) and high == pytest.approx(2), key


def test_mean_over_seeds_is_geometric() -> None:
    baseline = [run([session(0, [9])], "stock", 0), run([session(0, [9])], "stock", 1)]
    policy = [run([session(0, [4])], "saga", 0), run([session(0, [19])], "saga", 1)]
    out = result.paired(baseline, policy)
    # ratios 2 and 1/2
    assert out["task_completion_ratio"]["mean"] == pytest.approx(1)
    assert out["step_wait_mean_ratio"] == {"mean": None, "ci95": [None, None]}


def test_only_what_both_finished_is_compared() -> None:
    baseline = [run([session(0, [9, 4]), session(1, [2, None])], "stock")]
    policy = [run([session(0, [4, 2]), session(1, [2, 8]), session(7, [100])], "saga")]
    out = result.paired(baseline, policy)
    assert out["task_completion_ratio"]["mean"] == pytest.approx(15 / 8)
    # the unanswered call of the baseline takes the other arm's 8 s with it
    assert out["step_wait_mean_ratio"]["mean"] == pytest.approx(2)
    # throughput is what each really did: 3 tasks against 1
    assert out["tasks_per_min_ratio"]["mean"] == pytest.approx(3)


def test_runs_are_paired_by_seed_in_any_order() -> None:
    baseline, policy = arm("stock", 2, 4), arm("saga", 1, 3)
    expected = result.paired(baseline, policy)
    assert expected["seeds"] == [0, 1, 2]
    assert result.paired(baseline[::-1], policy[::-1]) == expected


def test_runs_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="none in common"):
        result.paired(arm("stock", 1), [run([session(0)], "saga", seed=9)])
    with pytest.raises(ValueError, match="two runs with the same seed"):
        result.paired(arm("stock", 1) * 2, arm("saga", 1))
    with pytest.raises(ValueError, match="at least one run"):
        result.paired([], arm("saga", 1))


waits = st.lists(st.lists(st.floats(0.01, 1e3), min_size=2, max_size=4), min_size=1, max_size=5)


def runs_of(by_seed: list[list[list[float]]], policy: str, factor: float = 1.0) -> list[Any]:
    return [
        run(
            [session(k, [factor * w for w in own], service=factor) for k, own in enumerate(seed)],
            policy,
            number,
            ended_s=1e4 * factor,
        )
        for number, seed in enumerate(by_seed)
    ]


@settings(max_examples=25)
@given(st.lists(waits, min_size=1, max_size=4), st.floats(0.2, 5))
def test_above_one_means_better(by_seed: list[list[list[float]]], factor: float) -> None:
    out = result.paired(runs_of(by_seed, "stock"), runs_of(by_seed, "saga", factor))
    for key in RATIOS:
        assert out[key]["mean"] == pytest.approx(1 / factor), key


@settings(max_examples=25)
@given(st.lists(st.tuples(waits, waits), min_size=1, max_size=4))
def test_interval_holds_the_mean_and_swapping_gives_the_reciprocal(
    seeds: list[tuple[list[list[float]], list[list[float]]]],
) -> None:
    a = runs_of([x for x, _ in seeds], "stock")
    b = runs_of([y for _, y in seeds], "saga")
    out, back = result.paired(a, b), result.paired(b, a)
    assert out == result.paired(a, b)
    for key in RATIOS:
        mean, (low, high) = out[key]["mean"], out[key]["ci95"]
        if low is not None:
            assert low <= mean <= high
        assert mean * back[key]["mean"] == pytest.approx(1)


def test_interval_is_about_as_wide_as_theory_says() -> None:
    """Many sessions with independent times: the log ratio's deviation is known."""
    count = 400
    sessions = [drawn("stock", 0, 2, count), drawn("saga", 0, 1, count)]
    low, high = result.paired(sessions[:1], sessions[1:])["task_completion_ratio"]["ci95"]
    pairs = zip(sessions[0].sessions, sessions[1].sessions, strict=True)
    times = [(result.completion_s(a) or 0, result.completion_s(b) or 0) for a, b in pairs]
    mean = [sum(column) / count for column in zip(*times, strict=True)]
    deviations = [a / mean[0] - b / mean[1] for a, b in times]
    error = math.sqrt(sum(d * d for d in deviations)) / count
    assert math.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize(
    ("ratio", "tie"), [(1.049, True), (1.051, False), (0.953, True), (0.95, False), (0.0, False)]
)
def test_ties(ratio: float, tie: bool) -> None:
    assert ratios.is_tie(ratio) is tie


# -- the document


def test_document_round_trips_and_holds_no_nan() -> None:
    made = document()
    assert json.loads(strictly(made)) == made
    assert list(made) == ["config", "runs", "paired"]
    assert made["config"]["rate"] is None
    assert [(r["policy"], r["seed"]) for r in made["runs"][:4]] == [
        ("stock", 0),
        ("stock", 1),
        ("stock", 2),
        ("saga", 0),
    ]
    assert [pair["policy"] for pair in made["paired"]] == ["saga", "policy-0"]


def test_document_is_deterministic() -> None:
    assert strictly(document()) == strictly(document())


def test_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline: 'stok' did not run; these did: stock"):
        result.to_json({}, arm("stock", 1), "stok")


def test_notes_become_plain_json() -> None:
    notes = {"held": np.int64(3), "share": np.float64("nan"), "ids": (1, 2)}
    made = result.to_json({}, [run(two_sessions(), notes=notes)], "stock")
    assert made["runs"][0]["notes"] == {"held": 3, "share": None, "ids": [1, 2]}
    assert made["paired"] == []
    strictly(made)


def test_nothing_here_imports_vllm_or_matplotlib() -> None:
    code = (
        "import sys, vllm_saga.simulator.report, vllm_saga.simulator.plots\n"
        "found = {'vllm', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
