from __future__ import annotations

import os

import pytest
from hypothesis import settings

# How long an example takes says more of what else runs on the machine than of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_modifyitems(items):
    """Tests marked `switch(variable, why)` run only where that variable is set."""
    for item in items:
        for mark in list(item.iter_markers("switch")):
            variable, why = mark.args
            reason = f"{why}; {variable}=1 runs"
            item.add_marker(pytest.mark.skipif(variable not in os.environ, reason=reason))
