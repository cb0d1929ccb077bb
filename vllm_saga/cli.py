"""The `vllm-saga` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_saga import SagaConfig, __version__
from vllm_saga.config import CONFIG_VARIABLE, ConfigError, load_config
from vllm_saga.doctor.command import doctor
from vllm_saga.graph.command import app as graph
from vllm_saga.router.command import router
from vllm_saga.top.command import top

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(graph, name="graph")
app.command()(router)
app.command()(top)
app.command()(doctor)


@app.callback()
def main() -> None:
    """Workflow-atomic scheduling for AI agents on stock vLLM."""


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def config(
    file: Annotated[
        Path | None,
        typer.Argument(help=f"A .json or .yaml file; without it, what {CONFIG_VARIABLE} names."),
    ] = None,
) -> None:
    """Check a settings file and show every setting: value, default and meaning."""
    environ = {CONFIG_VARIABLE: str(file)} if file else os.environ
    try:
        settings = load_config(None, environ)
    except ConfigError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    table = Table("setting", "value", "default", "meaning")
    for name, field in SagaConfig.model_fields.items():
        value = getattr(settings, name)
        style = "bold" if value != field.default else None
        table.add_row(name, str(value), str(field.default), field.description, style=style)
    Console().print(table)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def simulate(context: typer.Context) -> None:
    """Replay agent sessions through real vLLM schedulers on a virtual clock, and compare."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # It brings vLLM along, which takes seconds to import.
    from vllm_saga.simulator.command import app as simulator

    simulator(context.args, prog_name="vllm-saga simulate")
