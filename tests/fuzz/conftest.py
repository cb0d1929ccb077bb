from __future__ import annotations

import sys
from pathlib import Path

# What serves there is fuzzed here.
sys.path += [str(Path(__file__).parents[1] / part) for part in ("faults", "engine", "router")]
