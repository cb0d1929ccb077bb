"""The request router in a real Ray Serve LLM, with two real engines."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "ray"


@pytest.mark.live
@pytest.mark.timeout(1800)
@pytest.mark.switch("SAGA_TEST_RAY", "minutes, and 0.5 GB of Ray")
def test_sessions_stay_spread_and_outlive_their_replica():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
