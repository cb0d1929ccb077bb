"""Every parser of what comes from outside reads it, or refuses it as it documents.

`scripts/fuzz` runs the same for longer.
"""

from __future__ import annotations

import fuzz_clients  # noqa: F401
import fuzz_endpoints  # noqa: F401
import fuzz_engines  # noqa: F401
import fuzz_files  # noqa: F401
import pytest
from fuzz_registry import TARGETS
from hypothesis import HealthCheck, given, settings

#: Some inputs are large on purpose.
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_read_or_refused(name):
    target = TARGETS[name]
    settings(suppress_health_check=CHECKS)(given(target.inputs)(target.run))()
