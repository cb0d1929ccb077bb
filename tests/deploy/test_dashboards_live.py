"""The dashboards before a real Prometheus."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check-dashboards"


@pytest.mark.live
@pytest.mark.timeout(900)
@pytest.mark.switch("SAGA_TEST_DASHBOARDS", "minutes, and needs Prometheus")
def test_every_panel_returns_data():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
