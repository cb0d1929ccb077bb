"""Real clients before a router and two real servers: whose did it take each of their calls for?"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import scripted_model
from known_clients import CLIENTS, INSTALLED, Client
from recognition import Conversation, Seen, count_failures, problems, read_sessions
from rich.console import Console
from rich.table import Table
from scripted_model import DELEGATE

from benchmarks.live.arrangement import Arrangement
from benchmarks.live.fleet import Fleet
from benchmarks.live.process import free_port
from benchmarks.live.server import ServerOptions

#: Two conversations, turn about: each has to be told from the other.
TASKS = {"first": "Look at the first thing.", "second": "Look at the second thing."}
MORE = "Look once more."
HELPED = "with a sub-agent"
TURN_TIMEOUT_S = 300.0


@dataclass(slots=True)
class Outcome:
    """What one client did. seconds: for all turns of all its conversations."""

    client: Client
    conversations: dict[str, Conversation] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Router:
    """What the running router, and the servers behind it, say of the calls they have seen."""

    def __init__(self, fleet: Fleet, http: aiohttp.ClientSession) -> None:
        self.url = fleet.url
        self._urls = [fleet.url, *(server.url for server in fleet.servers)]
        self._http = http

    async def sessions(self) -> dict[str, Seen]:
        async with self._http.get(f"{self.url}/v1/saga/sessions") as answer:
            return read_sessions((await answer.json())["sessions"])

    async def failures(self) -> int:
        """Calls so far that a server answered with an error, or the router refused."""
        total = 0
        for url in self._urls:
            async with self._http.get(f"{url}/metrics") as answer:
                total += count_failures(await answer.text())
        return total


async def take_turn(
    client: Client, arguments: list[str], env: Mapping[str, str], folder: Path
) -> str | None:
    """Runs the client once in `folder`, where its output is kept; gives what went wrong."""
    process = await asyncio.create_subprocess_exec(
        str(client.executable), *arguments, env=dict(env), cwd=folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TURN_TIMEOUT_S)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        return f"not done after {TURN_TIMEOUT_S:.0f} s"
    text = output.decode(errors="replace")
    with (folder / "output.txt").open("a") as log:
        log.write(text)
    if process.returncode:
        return f"ended with {process.returncode}, see {folder / 'output.txt'}"
    return None if client.says in text else f"has not said {client.says!r}"


async def try_client(client: Client, router: Router, folder: Path) -> Outcome:
    """Two conversations of a client, their turns in alternation, and one that has a sub-agent.

    Each has a home of its own: clients go on with the last conversation that they find there.
    """
    outcome = Outcome(client)
    started, failures = time.monotonic(), await router.failures()
    turns = [(name, client.begin(task)) for name, task in TASKS.items()]
    if client.go_on is not None:
        turns += [(name, client.go_on(MORE)) for name in TASKS]
    if client.has_helpers:
        turns.append((HELPED, client.begin(f"{MORE} {DELEGATE}")))
    for name, arguments in turns:
        conversation = outcome.conversations.setdefault(name, Conversation(int(name == HELPED)))
        place, home = folder / name, folder / f"home-{name}"
        place.mkdir(parents=True, exist_ok=True)
        before = await router.sessions()
        failure = await take_turn(client, arguments, client.prepare(home, router.url), place)
        conversation.note(before, await router.sessions())
        if failure is not None:
            conversation.failed.append(failure)
    outcome.seconds = time.monotonic() - started
    outcome.problems = list(problems(client.source, outcome.conversations))
    if failed := await router.failures() - failures:
        outcome.problems.append(f"{failed} calls that failed")
    return outcome


async def try_all(wanted: list[Client], logs: Path) -> list[Outcome]:
    model = INSTALLED / "model"
    scripted_model.make(model)
    options = ServerOptions(
        model=model, blocks=4096, block_size=64, max_model_len=131072,
        max_num_batched_tokens=8192, stream_interval=1,
        extra=(
            "--load-format", "auto", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        ),
        env={"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
    )  # fmt: skip
    outcomes = []
    arrangement = Arrangement.parse("saga+saga")
    async with (
        Fleet(arrangement, options, [free_port(), free_port()], logs / "servers.log") as fleet,
        aiohttp.ClientSession() as http,
    ):
        for client in wanted:
            print(f"{client.name} ...", file=sys.stderr, flush=True)
            folder = Path(tempfile.mkdtemp(prefix="clients-"))
            outcome = await try_client(client, Router(fleet, http), folder)
            outcomes.append(outcome)
            if not outcome.problems:
                shutil.rmtree(folder)
    return outcomes


def show(outcomes: list[Outcome]) -> Table:
    """A line for each session."""
    columns = ("client", "conversation", "calls", "recognised by", "session", "backend", "s", "ok")
    table = Table(*columns, title="Real clients behind vllm-saga router")
    for outcome in outcomes:
        first = (outcome.client.name, f"{outcome.seconds:.0f}", "no" if outcome.problems else "yes")
        for name, conversation in outcome.conversations.items():
            for session, seen in conversation.sessions.items():
                client, seconds, ok = first
                calls = str(seen.calls)
                table.add_row(client, name, calls, seen.source, session, seen.backend, seconds, ok)
                first, name = ("", "", ""), ""
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/clients", description=__doc__)
    parser.add_argument("--only", default="", help="clients whose name holds this text")
    args = parser.parse_args()
    wanted = [client for client in CLIENTS if args.only.lower() in client.name.lower()]
    missing = [client for client in wanted if not client.executable.exists()]
    console = Console(width=None if sys.stdout.isatty() else 160)
    outcomes = asyncio.run(
        try_all([client for client in wanted if client not in missing], INSTALLED / "logs")
    )
    console.print(show(outcomes))
    found = [f"{o.client.name}: {problem}" for o in outcomes for problem in o.problems]
    found += [f"{client.name}: is not installed" for client in missing]
    for problem in found:
        console.print(problem, markup=False)
    return 1 if found or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
