"""`vllm-saga top`: asks again and again, and draws."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from vllm_saga.client import Client, UnreachableError
from vllm_saga.policy.explain import MAX_LIMIT
from vllm_saga.top.view import frame

# Lines of a frame that are neither workflows nor engines nor tenants.
_FIXED_LINES = 12
_LEAST_ROWS = 5


class NoAnswerError(Exception):
    """There is nothing to draw; the message says why, and what to do."""


def top(
    url: Annotated[str, typer.Option(help="A vLLM server, or the router.")] = (
        "http://localhost:8000"
    ),
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="The router wants its operator's.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Draw one frame and end.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Only the workflows of this tenant.")] = None,
    tenant_header: Annotated[str, typer.Option(help="How its header is called.")] = "x-tenant-id",
) -> None:
    """See who is running, who is held and for what, and whose the KV pool is."""
    headers = {} if tenant is None else {tenant_header: tenant}
    console = Console()
    try:
        client = Client(url, api_key, headers)
        asyncio.run(_once(client, console) if once else _live(client, console, interval))
    except (NoAnswerError, UnreachableError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


async def _once(client: Client, console: Console) -> None:
    async with client:
        console.print(await _look(client, console, once=True))


async def _live(client: Client, console: Console, interval: float) -> None:
    """Until interrupted; what goes wrong is shown, and asked again."""
    async with client:
        drawn = await _look(client, console)
        with Live(drawn, console=console, screen=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                try:
                    drawn = await _look(client, console)
                except (NoAnswerError, UnreachableError) as error:
                    drawn = Text(f"{time.strftime('%H:%M:%S')}  {error}", "red")
                live.update(drawn, refresh=True)


async def _look(client: Client, console: Console, once: bool = False) -> RenderableType:
    """As many workflows as the terminal has room for; with `once` all that can be had."""
    wanted = MAX_LIMIT if once else min(console.height, MAX_LIMIT)
    reply = await client.get(f"/v1/saga/workflows?limit={wanted}")
    overview = reply.values()
    if reply.status != 200 or not overview.keys() >= {"workflows", "engines", "tenants", "total"}:
        raise NoAnswerError(f"{client.url}: {_why(reply.status, reply.error)}")
    title = f"{client.url}  {time.strftime('%H:%M:%S')}"
    taken = _FIXED_LINES + len(overview["engines"]) + len(overview["tenants"])
    rows = wanted if once else max(console.height - taken, _LEAST_ROWS)
    return frame(overview, title, console.width, rows)


def _why(status: int, said: str) -> str:
    if status in (401, 403):
        return f"{said}. Pass the key with --api-key, or a tenant with --tenant."
    if status in (200, 404):
        return (
            f"{said}: it tells nothing of workflows. Start vLLM with VLLM_PLUGINS=saga and "
            "--scheduler-cls saga; `vllm-saga doctor --url` says more."
        )
    return said
