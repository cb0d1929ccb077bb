"""What is tried with each vLLM, and how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sources import REPO, clean_environment
from versions import Version

#: The steps in their order: the adapter's contract, the simulator's golden numbers, vLLM's own
#: scheduler tests, a real server.
STEPS = ("contract", "golden", "upstream", "serve")
#: How an environment that could not be made is told.
ENVIRONMENT = "environment"


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    said: counts, as the table shows them. ok is None where there was nothing to run.
    """

    ok: bool | None
    said: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One vLLM to try: `python` has it; logs and reports go into `folder`."""

    version: Version
    python: Path
    folder: Path

    def run(self, step: str) -> Outcome:
        """Run one of `STEPS`, its output both shown and kept in `folder`."""
        if step == "serve" and not self.version.built:
            return Outcome(None, "no CPU build")
        started = time.monotonic()
        ok, said = _RUN[step](self)
        return Outcome(ok, said, time.monotonic() - started)

    def pytest(self, name: str, *arguments: str) -> tuple[bool, str]:
        report = self.folder / f"{name}.xml"
        report.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        status = self.command(name, "-m", "pytest", *options)
        return status == 0, counted(report)

    def command(self, name: str, *arguments: str) -> int:
        """Run this Python, adding to the log called `name`; its exit status."""
        env = clean_environment() | {"PYTHONUNBUFFERED": "1"}
        # A console script of another environment must not be found before this one's.
        env["PATH"] = os.pathsep.join((str(self.python.parent), env.get("PATH", "")))
        command = [str(self.python), *arguments]
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=REPO, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                print(f"  {line}", end="", flush=True)
            return process.wait()


def counted(report: Path) -> str:
    """Passed and not passed, of a JUnit report of pytest."""
    if not report.exists():
        return "ended early"
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return f"{passed} passed" + (f", {failed} failed" if failed else "")


def compared(folder: Path) -> str:
    """Outcomes of vLLM's tests alike with both schedulers, of two reports of tests/upstream."""
    found = []
    for name in ("stock", "saga"):
        report = folder / f"{name}.json"
        if not report.exists():
            return "ended early"
        found.append(json.loads(report.read_text())["outcomes"])
    stock, saga = found
    alike = Counter(stock[test] for test in stock if saga.get(test) == stock[test])
    differ = len(stock.keys() | saga.keys()) - alike.total()
    said = f"{alike['passed']} pass with both"
    if failing := alike["failed"] + alike["error"]:
        said += f", {failing} fail with both"
    return said + (f", {differ} differ" if differ else "")


def _contract(trial: Trial) -> tuple[bool, str]:
    doctor = "from vllm_saga.cli import app; app(['doctor'])"
    fits = trial.command("contract", "-c", doctor) == 0
    ok, said = trial.pytest("contract", "tests/engine")
    # The doctor refuses what is not supported, whether or not it would work.
    ok = ok and (fits or not trial.version.supported)
    return ok, said if fits else f"doctor: problem; {said}"


def _golden(trial: Trial) -> tuple[bool, str]:
    # The rest of that file asks nothing of vLLM that these do not.
    file = "tests/simulator/test_simulate.py"
    return trial.pytest("golden", file, "-k", "golden_numbers or same_question")


def _upstream(trial: Trial) -> tuple[bool, str]:
    reports = trial.folder / "upstream"
    reports.mkdir(exist_ok=True)
    for old in reports.glob("*.json"):
        old.unlink()
    options = ("--unpatched", "--reports", str(reports))
    status = trial.command("upstream", "tests/upstream/run.py", *options)
    return status == 0, compared(reports)


def _serve(trial: Trial) -> tuple[bool, str]:
    return trial.pytest("serve", "tests/live", "-m", "smoke")


_RUN: dict[str, Callable[[Trial], tuple[bool, str]]] = {
    "contract": _contract,
    "golden": _golden,
    "upstream": _upstream,
    "serve": _serve,
}
