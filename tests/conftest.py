from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items):
    """Tests marked `switch(variable, why)` run only where that variable is set."""
    for item in items:
        for mark in list(item.iter_markers("switch")):
            variable, why = mark.args
            reason = f"{why}; {variable}=1 runs"
            item.add_marker(pytest.mark.skipif(variable not in os.environ, reason=reason))
