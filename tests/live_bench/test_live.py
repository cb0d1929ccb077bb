"""One small run of the live benchmark against a real server."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "tiny-model"


def quick_run(output: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The report of a run that went well and drew its picture, and what it printed."""
    command = [
        sys.executable, "-m", "benchmarks.live", "--model", str(MODEL), "--quick", *arguments,
        "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "report.png").stat().st_size > 10_000
    return json.loads((output / "report.json").read_text()), done.stdout


@pytest.mark.live
@pytest.mark.timeout(240)
@pytest.mark.skipif(not MODEL.exists(), reason="scripts/setup makes the model")
def test_quick_run_of_the_stock_arm(tmp_path: Path) -> None:
    report, said = quick_run(tmp_path, "--schedulers", "stock", "--sessions", "4", "--lanes", "2")
    [run] = report["runs"]
    assert run["scheduler"] == "stock" and run["failed"] == 0
    assert run["calls"] == report["config"]["calls"]
    assert run["task_completion_s"]["mean"] > 0
    # Prefixes hit as the trace says: nothing beyond what could be reused, and not nothing.
    assert 0 < run["prefix_hit_rate"] < 1
    assert run["engine_prefix_hits"] > 0
    assert "task completion" in said


@pytest.mark.live
@pytest.mark.timeout(300)
@pytest.mark.switch("SAGA_TEST_REPLICAS", "minutes")
def test_quick_run_of_two_replicas_behind_our_router(tmp_path: Path) -> None:
    report, said = quick_run(
        tmp_path,
        "--replicas",
        "2",
        "--arrangements",
        "saga+saga",
        "--sessions",
        "6",
        "--lanes",
        "4",
    )
    [run] = report["runs"]
    assert run["scheduler"] == "saga+saga" and run["failed"] == 0
    assert run["calls"] == sum(run["replica_calls"].values()) == sum(run["decisions"].values())
    assert set(run["replica_calls"]) == {"replica-1", "replica-2"}
    assert run["colocation"] > 0.9
    assert run["prefix_hit_rate"] > 0.5
    assert 0.5 <= report["config"]["arrivals"]["work_by_hash"][0] < 1
    assert "saga+saga" in said
