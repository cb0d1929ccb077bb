"""The ways in which a command of the docs is tested."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import typer
from pages import ROOT
from typer.testing import CliRunner

from vllm_saga.cli import app

_VARIABLE = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
_INTERPRETERS = ("python", ".venv/bin/python")


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a command sets for itself, and its words."""
    words = shlex.split(command)
    env = {}
    while words and (found := _VARIABLE.fullmatch(words[0])):
        env[found[1]] = found[2]
        del words[0]
    return env, words


@dataclass(frozen=True, slots=True)
class Runs:
    """Run here, in an empty folder: the command itself, with names of the docs replaced.

    instead: text of the command → what takes its place, in which `{name}` is one of `Places`.
    more: further arguments, which make it short. seconds: it takes so long that it only runs where
    SAGA_TEST_DOCS is set; its options are checked anyway. says: a text of its output.
    """

    instead: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    seconds: int = 0
    says: str = ""


@dataclass(frozen=True, slots=True)
class Serves:
    """A `vllm serve`: read by vLLM's own parser; started where SAGA_TEST_DOCS is set."""


@dataclass(frozen=True, slots=True)
class Routes:
    """A `vllm-saga router`: started, before small servers in place of the backends."""


@dataclass(frozen=True, slots=True)
class AsksRouter:
    """A curl to a router: sent to a real one, all of a page in their order."""


@dataclass(frozen=True, slots=True)
class AsksServer:
    """To a vLLM server: its path is one that there is; sent where SAGA_TEST_DOCS is set."""


@dataclass(frozen=True, slots=True)
class Exports:
    """Variables for a client: those with which it was run (tests/clients)."""


@dataclass(frozen=True, slots=True)
class RunElsewhere:
    """Run by what is there already: file `by` holds the text `holds`.

    options: the file that reads the command's options, or `benchmarks.NAME`, of which each is
    checked.
    """

    by: str
    holds: str
    options: str = ""


@dataclass(frozen=True, slots=True)
class NeedsMore:
    """Run by nobody here: it needs a cluster or the like. What it names is in these files.

    names: text of the command → the file that holds it.
    """

    names: Mapping[str, str]


Way = NeedsMore | Runs | Serves | Routes | AsksRouter | AsksServer | Exports | RunElsewhere


@dataclass(frozen=True, slots=True)
class Rule:
    """How the commands are tested that match `pattern` from beginning to end."""

    pattern: str
    way: Way

    def covers(self, command: str) -> bool:
        return re.fullmatch(self.pattern, command, re.DOTALL) is not None


def run_here(command: str, folder: Path) -> str:
    """Run a `vllm-saga …` or `python -m …` in this process; gives what it printed.

    Raises:
        AssertionError: it failed, or is no such command.
    """
    env, words = split(command)
    with chdir(folder):
        if words[0] == "vllm-saga":
            done = CliRunner(env={"COLUMNS": "200", **env}).invoke(app, words[1:])
            assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
            return done.output
        assert words[0] in _INTERPRETERS and words[1] == "-m", command
        return _run_module(words[2], words[3:])


def _run_module(name: str, arguments: Sequence[str]) -> str:
    said = StringIO()
    with patch.object(sys, "argv", [name, *arguments]), redirect_stdout(said):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=False)
        except SystemExit as ended:
            assert not ended.code, f"{name} {arguments}: {said.getvalue()}"
    return said.getvalue()


def run_apart(command: str, folder: Path, within_s: float) -> str:
    """Run a `python -m …` of ours in a process of its own; gives what it printed.

    Raises:
        AssertionError: it failed, or has not ended in time.
    """
    env, words = split(command)
    process = subprocess.Popen(
        [sys.executable, *words[1:]], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        # It stops the servers that it has started.
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    assert process.returncode == 0, f"{command}\n{said}"
    return said


def run_curl(command: str) -> str:
    """What a curl printed; it has to get an answer below 400."""
    words = split(command)[1]
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "200", *words[1:]],
        capture_output=True, text=True, env=os.environ | {"no_proxy": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def check_run_elsewhere(command: str, way: RunElsewhere) -> None:
    """The test is there, runs that program, and all options of the command are known."""
    check_files(command)
    path = ROOT / way.by
    assert path.is_file(), f"{command}: {way.by} is gone"
    assert way.holds in path.read_text(), f"{command}: {way.by} does not run {way.holds!r}"
    if way.options.startswith("benchmarks."):
        # scripts/demo adds the model.
        model = ("--model", "x") if way.options == "benchmarks.live" else ()
        check_options(way.options, [*arguments_of(command), *model])
    elif way.options:
        known = (ROOT / way.options).read_text()
        for word in arguments_of(command):
            assert not word.startswith("--") or word in known, f"{command}: no {word}"


def check_names(command: str, way: NeedsMore) -> None:
    """What a command that is not run names is there."""
    check_files(command)
    for name, file in way.names.items():
        assert name in command, f"{command}: the rule is about {name!r}"
        assert name in (ROOT / file).read_text(), f"{command}: no {name!r} in {file}"


def check_files(command: str) -> None:
    """The files of this repository that a command names are there."""
    for word in split(command)[1]:
        if re.match(r"(benchmarks|deploy|docs|scripts|tests)/", word):
            assert (ROOT / word).exists(), f"{command}: there is no {word}"


def arguments_of(command: str) -> list[str]:
    """What follows the program."""
    _, words = split(command)
    return words[3:] if words[1:2] == ["-m"] else words[1:]


def check_options(name: str, arguments: Sequence[str]) -> None:
    """The benchmark takes these arguments; nothing is run."""
    module = import_module(name)
    if hasattr(module, "__path__"):
        module = import_module(f"{name}.__main__")
    made = typer.Typer()
    made.command()(module.main)
    wanted = [word for word in arguments if word != "--help"]
    typer.main.get_command(made).make_context(name, wanted)
