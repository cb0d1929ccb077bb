"""Real clients, installed from PyPI and npm, before a router and two real servers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "clients"


@pytest.mark.live
@pytest.mark.timeout(1800)
@pytest.mark.switch("SAGA_TEST_CLIENTS", "minutes, and 1 GB of clients")
def test_each_conversation_of_each_client_is_one_session():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
