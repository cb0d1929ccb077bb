"""Every command that the docs tell their readers to run."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from fastapi import FastAPI
from known_clients import CLIENTS
from pages import ROOT, Command, commands, pages
from router_process import router_process
from rules import RULES
from starlette.routing import Match
from ways import (
    AsksRouter,
    AsksServer,
    Exports,
    NeedsMore,
    Routes,
    Rule,
    RunElsewhere,
    Runs,
    arguments_of,
    check_names,
    check_options,
    check_run_elsewhere,
    run_apart,
    run_curl,
    run_here,
    split,
)

from vllm_saga.server.endpoints import SagaEndpoints

COMMANDS = [command for page in pages() for command in commands(page)]
SLOW = "SAGA_TEST_DOCS" in os.environ
#: On a machine that has much else to do.
PATIENCE = 10
#: Paths of vLLM's own that the docs ask.
OF_VLLM = ("/metrics", "/health", "/v1/models", "/v1/chat/completions", "/v1/completions")


def rules_of(text: str) -> list[Rule]:
    return [rule for rule in RULES if rule.covers(text)]


def commands_by(way: type) -> Iterator[tuple[str, Rule]]:
    """The commands, each once, that are tested in one way."""
    for text in dict.fromkeys(command.text for command in COMMANDS):
        for rule in rules_of(text)[:1]:
            if isinstance(rule.way, way):
                yield text, rule


def all_of(way: type) -> pytest.MarkDecorator:
    found = list(commands_by(way))
    return pytest.mark.parametrize("text, rule", found, ids=[text[:70] for text, _ in found])


def test_every_command_has_exactly_one_rule():
    without = [str(command) for command in COMMANDS if not rules_of(command.text)]
    assert not without, "\n".join(["without a rule in tests/docs/rules.py:", *without])
    several = [str(command) for command in COMMANDS if len(rules_of(command.text)) > 1]
    assert not several, "\n".join(["with several rules:", *several])


def test_every_rule_has_a_command():
    unused = [r.pattern for r in RULES if not any(r.covers(c.text) for c in COMMANDS)]
    assert not unused


def short(text: str, way: Runs) -> str:
    """What runs in place of a command; names between braces are not filled in yet."""
    for name, value in way.instead.items():
        text = text.replace(name, value)
    return f"{text} {way.more}".strip()


RUN_HERE = {short(text, rule.way): rule.way for text, rule in commands_by(Runs)}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("text", RUN_HERE, ids=[text[:90] for text in RUN_HERE])
def test_what_runs_here(text, places, tmp_path):
    way = RUN_HERE[text]
    text = places.fill(text)
    if text.startswith("pip install"):
        check_extras(text)
    if way.seconds and not SLOW:
        if text.startswith("python -m "):
            check_options(split(text)[1][2], arguments_of(text))
        pytest.skip(f"about {way.seconds} s; SAGA_TEST_DOCS=1 runs")
    if text.startswith("pip install"):
        check_install(tmp_path)
    elif way.seconds and text.startswith("python -m "):
        assert way.says in run_apart(text, tmp_path, within_s=PATIENCE * way.seconds)
    else:
        assert way.says in run_here(text, tmp_path)


def check_extras(text: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"\[(\w+)\]", text)) <= project["optional-dependencies"].keys()


def check_install(folder: Path) -> None:
    """A copy of what is tracked, installed into a folder of its own, has its command."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "copy" / name)
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--target", str(target), "."], cwd=folder / "copy", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        [sys.executable, target / "bin" / "vllm-saga", "version"],
        env=os.environ | {"PYTHONPATH": str(target)}, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr


@all_of(RunElsewhere)
def test_what_other_tests_run(text, rule):
    check_run_elsewhere(text, rule.way)


@all_of(NeedsMore)
def test_what_nobody_runs_here(text, rule):
    check_names(text, rule.way)


@all_of(Routes)
def test_routers(text, rule, places):
    _, words = split(to_backends(text, places).replace("0.0.0.0", "127.0.0.1"))

    async def start() -> None:
        async with router_process(*words[2:], "--port", "0") as router:
            await wait_until_ready(router.url)

    asyncio.run(start())


async def wait_until_ready(url: str) -> None:
    async with asyncio.timeout(20), aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/ready") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.05)


def to_backends(text: str, places) -> str:
    first, second = places.backends
    text = text.replace("http://10.0.0.1:8000", first).replace("http://10.0.0.2:8000", second)
    return text.replace("http://127.0.0.1:8000", first)


def test_questions_to_a_router(places):
    """All of them, in the order of the docs, to one router."""
    asked = [text for text, _ in commands_by(AsksRouter)]
    names = [url.removeprefix("http://") for url in places.backends]

    async def ask() -> list[str]:
        async with router_process("--backends", ",".join(places.backends)) as router:
            texts = (
                text.replace("http://127.0.0.1:30000", router.url).replace(
                    "10.0.0.1:8000", names[0]
                )
                for text in asked
            )
            return [await asyncio.to_thread(run_curl, text) for text in texts]

    answers = asyncio.run(ask())
    assert any(names[0] in answer and names[1] in answer for answer in answers)


@all_of(AsksServer)
def test_questions_to_a_server_are_answered_somewhere(text, rule):
    app = FastAPI()
    SagaEndpoints().attach_router(app)
    _, words = split(text)
    [url] = [word for word in words if word.startswith("http")]
    path = url.removeprefix("http://127.0.0.1:8000").partition("?")[0]
    method = "POST" if "POST" in words else "GET"
    scope = {"type": "http", "path": path, "method": method, "root_path": "", "headers": []}
    ours = any(route.matches(scope)[0] is Match.FULL for route in app.routes)
    assert ours or path in OF_VLLM


@all_of(Exports)
def test_variables_are_those_with_which_clients_were_run(text, rule):
    known: dict[str, str] = {}
    for client in CLIENTS:
        known |= client.env("http://HOST")
    for word in shlex.split(text)[1:]:
        name, _, value = word.partition("=")
        assert name in known, name
        if "URL" in name:
            assert value.rpartition(":")[2].partition("/")[2] == known[name].partition("HOST/")[2]


def test_commands_are_found():
    texts = {command.text for command in COMMANDS}
    assert "vllm serve MODEL --scheduler-cls saga" in texts
    assert any(text.endswith("--policy saga") and "--policy vllm" in text for text in texts)
    assert all(isinstance(command, Command) and command.line > 0 for command in COMMANDS)
