"""The harness' answers, from real servers: a short run of the benchmark's first part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.live
@pytest.mark.timeout(1800)
@pytest.mark.switch("SAGA_TEST_EQUIVALENCE", "minutes, and 0.9 GB of lm-evaluation-harness")
def test_answers_under_pressure_are_those_of_stock_alone(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.equivalence", "--only", "outputs", "--quick",
        "--output", str(tmp_path),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    arms = json.loads((tmp_path / "report.json").read_text())["outputs"]["arms"]
    assert arms["saga-pressed"]["seen"]["harness_held"] > 0
    for arm in ("stock-pressed", "saga-pressed"):
        assert arms[arm]["seen"]["preemptions"] > 0
        assert len(arms[arm]["parts"]) == 4
