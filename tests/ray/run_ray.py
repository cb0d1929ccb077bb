"""Our request router before two real vLLM replicas of Ray Serve LLM: run by scripts/ray.

Each arrangement serves the same agents on engines that have nothing cached.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import ray_fleet as fleet
import typer
from ray_fleet import Agent, ChatAgent, converse

CALLS = 6
# So many of a session's tokens have to be cached where its calls stay on one replica.
_STAYS = 0.97
PREFIX = "ray.serve.llm.request_router.PrefixCacheAffinityRouter"


@dataclass(frozen=True)
class Arrangement:
    """A request router: Ray's settings of it (None: ours, as documented), and how many ingress
    replicas ask one each.
    """

    settings: dict[str, Any] | None = None
    ingresses: int = 1


ARRANGEMENTS = {
    "saga": Arrangement(),
    "power-of-two": Arrangement({}),
    "prefix": Arrangement({"request_router_class": PREFIX}),
    "saga-two-ingresses": Arrangement(ingresses=2),
}


def agents() -> list[Agent]:
    """Six that say who they are by vLLM's header, one by Claude Code's, one not at all."""
    named = [Agent(f"s{index}", {"X-Session-ID": f"s{index}"}) for index in range(6)]
    claude = Agent("claude", {"X-Claude-Code-Session-Id": "claude"})
    return [*named, claude, ChatAgent("nobody", {})]


def check(true: bool, claim: str) -> None:
    """Say what has been seen.

    Raises:
        SystemExit: it is not so.
    """
    print(f"  {'ok' if true else 'FAILED'}: {claim}", flush=True)
    if not true:
        raise SystemExit(1)


def measure(name: str, port: int) -> tuple[list[Agent], dict[str, set[str]], float]:
    """Serve the agents; which engine has computed whose calls, and the share that was cached."""
    arrangement = ARRANGEMENTS[name]
    started = time.monotonic()
    fleet.start(arrangement.settings, arrangement.ingresses)
    print(f"{name}: two replicas are up after {time.monotonic() - started:.0f} s", flush=True)
    served = agents()
    asyncio.run(converse(served, port, CALLS))
    homes = fleet.sessions_by_engine()
    hits = sum(agent.hit_rate() for agent in served) / len(served)
    twice = set.intersection(*homes.values())
    sizes = " and ".join(str(len(sessions)) for sessions in homes.values())
    print(
        f"  of the tokens computed before, {hits:.1%} were cached; the engines know {sizes} "
        f"sessions, {len(twice)} of them both",
        flush=True,
    )
    return served, homes, hits


def check_saga(port: int) -> float:
    """A session stays, sessions spread, and those of a dead replica go on at the other one."""
    served, homes, hits = measure("saga", port)
    one, other = homes.values()
    check(not one & other, "each session is known to one engine only")
    check(len(one | other) == len(served), "named, Claude Code's and nameless sessions are told")
    check(min(len(one), len(other)) >= 2, "both replicas have sessions")
    check(hits >= _STAYS, f"at least {_STAYS:.0%} of what was computed before is cached")
    victim, survivor = fleet.replica_processes()
    victim.kill()
    asyncio.run(converse(served, port, 3))
    left = fleet.wait_until(
        lambda: [s for s in fleet.sessions_by_engine().values() if len(s) == len(served)],
        20.0, "the engine that is left does not know all sessions",
    )  # fmt: skip
    check(bool(left) and survivor.is_running(), "all sessions are where a replica is left")
    again = min(agent.hit_rate(CALLS + 1) for agent in served)
    check(again >= _STAYS, "those that moved are cached from their second call there on")
    return hits


def check_two_ingresses(port: int) -> float:
    """Two routers that do not talk: they find sessions by the engines' reports."""
    return measure("saga-two-ingresses", port)[2]


CHECKS: dict[str, Callable[[int], float]] = {
    "saga": check_saga,
    "saga-two-ingresses": check_two_ingresses,
}


def main(
    only: Annotated[str, typer.Option(help=f"{', '.join(ARRANGEMENTS)}; A,B.")] = (
        "saga,power-of-two"
    ),
    verbose: Annotated[bool, typer.Option("--verbose", help="Ray's and vLLM's logs.")] = False,
) -> None:
    """Seen: where sessions go, what is cached, and what a dead replica changes."""
    names = only.split(",")
    if unknown := [name for name in names if name not in ARRANGEMENTS]:
        raise typer.BadParameter(f"{unknown} are none of {', '.join(ARRANGEMENTS)}")
    hits = {}
    with fleet.cluster(verbose) as port:
        for name in names:
            run = CHECKS.get(name, lambda port, name=name: measure(name, port)[2])
            hits[name] = run(port)
            fleet.stop()
    if {"saga", "power-of-two"} <= hits.keys():
        check(hits["saga"] > hits["power-of-two"] + 0.1, "more is cached than with Ray's default")


if __name__ == "__main__":
    typer.run(main)
