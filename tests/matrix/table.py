"""The matrix's result, for a terminal and for a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steps import ENVIRONMENT, STEPS, Outcome
from versions import Version

Results = Mapping[Version, Mapping[str, Outcome]]

_TITLES = {
    "contract": "contract and engine tests",
    "golden": "simulator's golden numbers",
    "upstream": "vLLM's own scheduler tests",
    "serve": "`vllm serve`",
}


def failures(results: Results) -> list[str]:
    """Every step of a supported version that failed, one line each."""
    return [
        f"vLLM {version.number}: {step}: {outcome.said}"
        for version, outcomes in results.items()
        for step, outcome in outcomes.items()
        if version.supported and outcome.ok is False
    ]


def as_text(results: Results) -> str:
    """Aligned columns, with each step's time in seconds."""
    rows = [["vLLM", *STEPS], *(_row(v, results[v], seconds=True) for v in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_markdown(results: Results) -> str:
    """A table as README.md has it; without times, which are this machine's."""
    rows = [
        ["vLLM", *(_TITLES[step] for step in STEPS)],
        ["---"] * (1 + len(STEPS)),
        *(_row(v, results[v], seconds=False) for v in results),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(version: Version, outcomes: Mapping[str, Outcome], seconds: bool) -> Sequence[str]:
    name = version.number if version.supported else f"{version.number} (best effort)"
    if not version.built:
        name += ", Python files"
    if ENVIRONMENT in outcomes:
        return [name, f"FAILED: {outcomes[ENVIRONMENT].said}", *[""] * (len(STEPS) - 1)]
    return [name, *(_cell(outcomes.get(step), seconds) for step in STEPS)]


def _cell(outcome: Outcome | None, seconds: bool) -> str:
    if outcome is None:
        return "not run"
    said = outcome.said if outcome.ok is not False else f"FAILED: {outcome.said}"
    return f"{said} ({outcome.seconds:.0f} s)" if seconds and outcome.seconds else said
