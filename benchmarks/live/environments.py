"""Others' programs, each in a virtual environment of its own, made when it is first wanted."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.live.process import ServerError

KEPT = Path(__file__).parents[2] / ".cache"


class InstallFailed(ServerError):
    """pip, or the making of the environment, did not manage; says the last line of its output."""


async def make(venv: Path, *installs: Sequence[str]) -> Path:
    """The folder of the environment's programs. Each of `installs`: arguments of `pip install`.

    Raises:
        InstallFailed: it cannot be made. The next call tries again.
    """
    complete = venv / "complete"
    if not complete.exists():
        pip = (sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"))
        await _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv))
        for arguments in installs:
            await _run(*pip, "install", "--quiet", *arguments)
        complete.touch()
    return venv / "bin"


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines() or ["no output"]
        raise InstallFailed(f"{' '.join(command[1:])}: {lines[-1]}")
