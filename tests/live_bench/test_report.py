"""The report's arithmetic, on records made by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.live import report
from benchmarks.live.replay import CallRecord, SessionRecord
from benchmarks.live.server import counter_deltas, parse_metrics


def record(index: int, ttft: float, prompt: int, reusable: int, cached: int) -> CallRecord:
    start = 10.0 * index
    return CallRecord(
        "s", index, start, start + ttft, start + ttft + 1, prompt, reusable, cached, 5, 2.0
    )


def arm(scheduler: str, slow: float) -> report.ArmResult:
    """Two finished sessions and a failed one, over 60 seconds."""
    calls = [record(0, 0.1, 100, 0, 0), record(1, slow, 200, 105, 64)]
    done = SessionRecord("a", 0.0, 10.0 * slow, calls=calls)
    other = SessionRecord("b", 0.0, 30.0 * slow, calls=[record(0, 0.1, 100, 0, 32)])
    failed = SessionRecord("c", 0.0, 1.0, error="RequestFailed: call 0: HTTP 500")
    counters = {"preemptions": 3, "prefix_hits": 96, "prefix_queries": 400}
    return report.ArmResult(scheduler, [done, other, failed], 0.0, 60.0, counters, 32, 6.0, 90.0)


def test_percentiles_interpolate() -> None:
    assert report.percentile([4, 1, 3, 2], 0.5) == 2.5
    assert report.percentile([1.0], 0.99) == 1.0
    assert math.isnan(report.percentile([], 0.5))


def test_rounds_add_up() -> None:
    one = arm("stock", 2.0)
    both = report.pool([one, replace(one, started=100.0, ended=220.0)])
    assert both.window_s == 180.0
    assert len(both.sessions) == 2 * len(one.sessions)
    assert both.counters == {key: 2 * value for key, value in one.counters.items()}
    assert report.summarise(both)["tasks_per_min"] == pytest.approx(4 * 60 / 180)


def test_summary() -> None:
    run = report.summarise(arm("stock", 2.0))
    assert run["task_completion_s"] == {"mean": 40.0, "p50": 40.0, "p95": pytest.approx(58.0)}
    assert run["step_wait_s"] == {"mean": 2.0, "p99": 2.0}
    assert run["tasks_per_min"] == 2.0
    assert run["prefix_hit_rate"] == pytest.approx(96 / 400)
    assert run["reprefilled_tokens"] == 96 - 64  # 105 reusable tokens are 3 whole blocks
    assert run["reuse_efficiency"] == pytest.approx(64 / 96)
    assert (run["preemptions"], run["failed"]) == (3, 1)
    assert run["errors"] == ["RequestFailed: call 0: HTTP 500"]
    assert run["client_cpu_share"] == pytest.approx(0.1)


def test_ratios_above_one_mean_saga_is_better() -> None:
    stock, saga = report.summarise(arm("stock", 4.0)), report.summarise(arm("saga", 1.0))
    gain = report.ratios([stock, saga])
    assert gain == {"task_completion_mean": 4.0, "step_wait_mean": 4.0, "tasks_per_min": 1.0}
    assert report.ratios([saga, stock]) == gain
    assert report.ratios([stock]) == {}


def test_arrangements_are_compared_with_saga_behind_saga() -> None:
    slow = {"saga+saga": 1.0, "saga+session": 2.0, "stock+vllm-router-cache_aware": 4.0}
    runs = [report.summarise(arm(name, seconds)) for name, seconds in slow.items()]
    gain = report.ratios(runs)
    assert {name: found["task_completion_mean"] for name, found in gain.items()} == {
        "saga+session": 2.0,
        "stock+vllm-router-cache_aware": 4.0,
    }
    assert report.ratios(runs[1:]) == {}


def test_table_and_picture_of_arrangements(tmp_path: Path) -> None:
    arms = [
        replace(arm(name, slow), replicas=2, router_cpu_s=1.5)
        for name, slow in (("saga+saga", 1.0), ("saga+round_robin", 2.5))
    ]
    runs = [report.summarise(one) for one in arms]
    assert runs[0]["router_cpu_s_per_call"] == pytest.approx(0.5)
    console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
    console.print(report.table_of_arrangements(runs, "title"))
    lines = console.export_text().splitlines()
    [best] = [line for line in lines if line.startswith("│ saga+saga ")]
    [other] = [line for line in lines if line.startswith("│ saga+round_robin ")]
    assert "2.50x" in other and "unknown" in other and "x" not in best.replace("unknown", "")
    report.picture(tmp_path / "report.png", arms, "title")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_the_agreed_fields_and_no_nan(tmp_path: Path) -> None:
    empty = report.ArmResult("saga", [], 0.0, 0.0, {}, 32, 0.0, 0.0)
    runs = [report.summarise(arm("stock", 1.0)), report.summarise(empty)]
    report.write_json(tmp_path / "report.json", {"seed": 1}, runs)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert set(read) == {"config", "runs", "ratios"}
    agreed = {
        "scheduler", "task_completion_s", "step_wait_s", "tasks_per_min",
        "prefix_hit_rate", "reprefilled_tokens", "preemptions", "failed",
    }  # fmt: skip
    assert all(agreed <= set(run) for run in read["runs"])
    assert read["runs"][1]["task_completion_s"]["mean"] is None


def test_table_and_picture(tmp_path: Path) -> None:
    arms = [arm("stock", 2.0), arm("saga", 1.0)]
    console = Console(record=True, width=100, file=(tmp_path / "out").open("w"))
    console.print(report.table([report.summarise(one) for one in arms], "title"))
    text = console.export_text()
    assert "stock vLLM" in text and "2.00x" in text and "re-prefilled tokens" in text
    report.picture(tmp_path / "report.png", arms, "title")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_hits_over_time() -> None:
    x, y = report.hit_rate_over_time(arm("stock", 1.0), buckets=6)
    assert x == [5.0, 15.0]
    assert y == [pytest.approx(32 / 200), pytest.approx(64 / 200)]


def test_metrics_are_summed_over_labels() -> None:
    text = (
        "# HELP vllm:num_preemptions_total x\n"
        'vllm:num_preemptions_total{engine="0",model_name="m"} 2.0\n'
        'vllm:num_preemptions_total{engine="1",model_name="m"} 3.0\n'
        "vllm:prefix_cache_hits_total 1e3\n"
    )
    after = parse_metrics(text)
    assert after["vllm:num_preemptions_total"] == 5.0
    deltas = counter_deltas({"vllm:num_preemptions_total": 1.0}, after)
    assert deltas == {"preemptions": 4, "prefix_queries": 0, "prefix_hits": 1000}
