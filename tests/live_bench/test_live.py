"""One small run of the live benchmark against a real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "tiny-model"


@pytest.mark.live
@pytest.mark.timeout(240)
@pytest.mark.skipif(not MODEL.exists(), reason="scripts/setup makes the model")
def test_quick_run_of_the_stock_arm(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.live", "--model", str(MODEL), "--quick",
        "--schedulers", "stock", "--sessions", "4", "--lanes", "2", "--output", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    [run] = report["runs"]
    assert run["scheduler"] == "stock" and run["failed"] == 0
    assert run["calls"] == report["config"]["calls"]
    assert run["task_completion_s"]["mean"] > 0
    # Prefixes hit as the trace says: nothing beyond what could be reused, and not nothing.
    assert 0 < run["prefix_hit_rate"] < 1
    assert run["engine_prefix_hits"] > 0
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "task completion" in done.stdout
