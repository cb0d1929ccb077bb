"""The fuzzers for minutes rather than moments: `scripts/fuzz` calls this."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / part) for part in ("fuzz", "faults", "router"))]

import fuzz_clients  # noqa: E402, F401
import fuzz_endpoints  # noqa: E402, F401
import fuzz_engines  # noqa: E402, F401
import fuzz_files  # noqa: E402, F401
from fuzz_registry import TARGETS, Target  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis.database import DirectoryBasedExampleDatabase  # noqa: E402

#: Inputs of one run of hypothesis: what it keeps in memory of them grows.
BATCH = 400
PROGRESS_S = 30.0


@dataclass
class Outcome:
    name: str
    examples: int
    seconds: float
    failures: int


def fuzz(target: Target, minutes: float, kept: Path) -> Outcome:
    """New inputs for so many minutes, or until one fails: it is kept, and tried first next time."""
    began, told, count, failures = time.monotonic(), time.monotonic(), 0, 0
    failed = ""

    def check(value: object) -> None:
        nonlocal count, failed
        count += 1
        try:
            target.run(value)
        except Exception:
            # Hypothesis, too, may not be able to tell of what is nested without end.
            failed = traceback.format_exc()
            raise

    run = settings(
        max_examples=BATCH,
        deadline=None,
        database=DirectoryBasedExampleDatabase(kept / "examples" / target.name),
        phases=[Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )(given(target.inputs)(check))
    while time.monotonic() - began < 60.0 * minutes and not failures:
        try:
            run()
        except Exception:
            failures += 1
            file = kept / f"{target.name}.txt"
            file.write_text(f"{traceback.format_exc()}\n\n{failed}")
            print(f"{target.name}: FAILED, see {file}", flush=True)
        now = time.monotonic()
        if now - told >= PROGRESS_S or now - began >= 60.0 * minutes:
            told = now
            print(f"{target.name}: {count} examples, {(now - began) / 60:.1f} min", flush=True)
    return Outcome(target.name, count, time.monotonic() - began, failures)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "fuzz")
    args = parser.parse_args()
    unknown = [name for name in args.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    # What is refused is also logged: here that would be all of it.
    logging.disable(logging.CRITICAL)
    chosen = [TARGETS[name] for name in args.targets or TARGETS]
    outcomes = [fuzz(target, args.minutes, args.output) for target in chosen]
    print(f"\n{'target':<22} {'examples':>9} {'minutes':>8} {'failures':>9}")
    for each in outcomes:
        minutes = each.seconds / 60
        print(f"{each.name:<22} {each.examples:>9} {minutes:>8.1f} {each.failures:>9}")
    return int(any(each.failures for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
