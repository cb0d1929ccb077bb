"""Which versions of vLLM fit."""

from __future__ import annotations

import re

from vllm_saga.doctor.findings import Finding, ok, problem, warning

#: As pyproject.toml demands, and the newest that `scripts/test --matrix` passes with.
OLDEST = (0, 28)
TESTED = (0, 33)


def check_version(check: str, text: str) -> Finding:
    """A version of vLLM against those that fit; builds from source are taken at their word."""
    match = re.match(r"(\d+)\.(\d+)", text)
    found = f"vLLM {text}"
    if match is None:
        return warning(check, found, f"It names no release; {_said(TESTED)} is tested.")
    version = (int(match[1]), int(match[2]))
    if version < OLDEST and version != (0, 0):
        return problem(check, found, f"Upgrade: {_said(OLDEST)} is the oldest that fits.")
    if version > TESTED:
        return warning(
            check, found, f"Newer than {_said(TESTED)}, which is tested: watch the first start."
        )
    return ok(check, found)


def _said(version: tuple[int, int]) -> str:
    return f"vLLM {version[0]}.{version[1]}"
