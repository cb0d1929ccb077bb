"""An environment for each vLLM of the matrix: made when first wanted, and used again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version as installed_version
from pathlib import Path

import sources
from sources import REPO, SourceError
from versions import Version

CACHE = REPO / ".cache" / "matrix"


class EnvironmentFailedError(RuntimeError):
    """An environment cannot be made; the message says where the output is."""


def folder_of(version: Version) -> Path:
    """Where the environment, logs and reports of a version are."""
    return CACHE / version.number


def make(version: Version) -> Path:
    """The Python that has this vLLM.

    Raises:
        EnvironmentFailedError: it cannot be made.
    """
    if installed_version("vllm").partition("+")[0] == version.number:
        return Path(sys.executable)
    venv = folder_of(version) / "venv"
    if version.built:
        _set_up(version, venv)
    else:
        try:
            _layer(version, venv)
        except (OSError, SourceError, subprocess.CalledProcessError) as error:
            raise EnvironmentFailedError(str(error)) from error
    return venv / "bin" / "python"


def _set_up(version: Version, venv: Path) -> None:
    """scripts/setup for another version; it does nothing where it has been done."""
    env = os.environ | {
        "PYTHON": sys.executable,
        "SETUP_VENV": str(venv.relative_to(REPO)),
        "SETUP_VLLM": version.number,
    }
    if subprocess.run([REPO / "scripts" / "setup"], env=env).returncode:
        raise EnvironmentFailedError(f"scripts/setup failed for vLLM {version.number}")


def _layer(version: Version, venv: Path) -> None:
    """Released Python files of vLLM over everything else that this Python has.

    The metadata distribution calls it a CPU build: vLLM chooses its platform by that.
    """
    stamp = venv / "layered"
    base = sysconfig.get_path("purelib")
    if stamp.exists() and stamp.read_text() == base:
        return
    shutil.rmtree(venv, ignore_errors=True)
    print(f"{venv}: vLLM {version.number}'s Python files", flush=True)
    _run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    sdist = sources.fetch_sdist(version.number)
    with tempfile.TemporaryDirectory(dir=venv) as scratch:
        root = sources.extract(sdist, Path(scratch), lambda name: name.startswith("vllm/"))
        (root / "vllm").rename(site / "vllm")
        script = str(REPO / "scripts" / "make-vllm-metadata")
        _run(sys.executable, script, scratch, f"{version.number}+cpu")
        (wheel,) = Path(scratch).glob("*.whl")
        shutil.unpack_archive(wheel, site, "zip")
    stamp.write_text(base)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
