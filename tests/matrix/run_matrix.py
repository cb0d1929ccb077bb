#!/usr/bin/env python3
"""The version matrix: the plugin with each vLLM that it is meant for (scripts/test --matrix)."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "upstream"))

from environments import CACHE, EnvironmentFailedError, folder_of, make
from sources import REPO
from steps import ENVIRONMENT, STEPS, Outcome, Trial
from table import as_markdown, as_text, failures
from versions import UnknownVersionError, Version, choose

TABLE = CACHE / "table.md"


def try_version(version: Version, steps: list[str]) -> dict[str, Outcome]:
    """The outcome of each step; of `ENVIRONMENT` only, where there is none."""
    folder = folder_of(version)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\n== vLLM {version.number}: {ENVIRONMENT}", flush=True)
    try:
        python = make(version)
    except EnvironmentFailedError as error:
        print(error, flush=True)
        return {ENVIRONMENT: Outcome(False, str(error).splitlines()[0])}
    trial = Trial(version, python, folder)
    outcomes = {}
    for step in steps:
        (folder / f"{step}.log").unlink(missing_ok=True)
        print(f"\n== vLLM {version.number}: {step}", flush=True)
        outcomes[step] = trial.run(step)
    return outcomes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/test --matrix", description=__doc__)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="such as 0.32; default: all")
    parser.add_argument(
        "--step", action="append", choices=STEPS, help="only this one; may be repeated"
    )
    parser.add_argument("--clean", action="store_true", help="make the environments anew")
    args = parser.parse_args()
    try:
        args.versions = choose(args.versions)
    except UnknownVersionError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = parse_args()
    results = {}
    for version in args.versions:
        if args.clean:
            shutil.rmtree(folder_of(version), ignore_errors=True)
        results[version] = try_version(version, args.step or list(STEPS))
    TABLE.write_text(as_markdown(results) + "\n")
    print(f"\n== matrix\n{as_text(results)}")
    print(f"as markdown: {TABLE.relative_to(REPO)}; logs: {CACHE.relative_to(REPO)}/VERSION/*.log")
    failed = failures(results)
    for line in failed:
        print(f"FAILED: {line}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
