"""What the benchmarks' commands share: options, and how lists are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Traces = Annotated[
    Path | None, typer.Option(help="Folder of trace files; without it, built-in workloads.")
]


def listed(text: str) -> list[str]:
    """The items of a comma-separated option; spaces around them and empty ones do not count."""
    return [part.strip() for part in text.split(",") if part.strip()]
