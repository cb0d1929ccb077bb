"""`vllm-saga doctor`: every check, as a table or as JSON."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_saga.client import Client, UnreachableError
from vllm_saga.config import CONFIG_VARIABLE
from vllm_saga.doctor.findings import Finding, Level, problem
from vllm_saga.doctor.installed import check_plugins, check_settings, check_vllm
from vllm_saga.doctor.parsers import check_parser
from vllm_saga.doctor.router import check_router
from vllm_saga.doctor.server import check_server

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def doctor(
    url: Annotated[
        str | None, typer.Option(help="A running vLLM server, or the router: it is asked, too.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="The router wants its operator's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help=f"Settings file; without it, what {CONFIG_VARIABLE} names.")
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            "--tool-call-parser",
            "--model-tool-parser",
            help="The one of your model, as vLLM calls it: can the names of tools be read?",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check the installation, the settings and a server, and say what to do; 1 if there is a
    problem.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    findings = _examine_here(config, tool_call_parser)
    if url is not None:
        try:
            findings += asyncio.run(_examine(Client(url, api_key)))
        except UnreachableError as error:
            findings.append(problem("server", str(error), "Is it up, and is --url right?"))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        Console().print(_table(findings))
    raise typer.Exit(any(finding.level is Level.PROBLEM for finding in findings))


def _examine_here(config: Path | None, parser: str | None) -> list[Finding]:
    settings, findings = check_settings(config, os.environ)
    findings += [*check_vllm(), *check_plugins(os.environ)]
    if parser is not None:
        findings.append(check_parser(parser, settings.tool_patterns if settings else {}))
    return findings


async def _examine(client: Client) -> list[Finding]:
    async with client:
        found = await check_router(client)
        return await check_server(client) if found is None else found


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found, and what to do", ratio=1)
    for finding in findings:
        said = Text(finding.found)
        if finding.advice:
            said.append(f"\n→ {finding.advice}", _STYLES[finding.level])
        table.add_row(finding.check, Text(finding.level, _STYLES[finding.level]), said)
    return table
