"""What an arm of the benchmark is made of: a scheduler, and with several replicas a router."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.live.routers import PEERS, find_peer
from vllm_saga.router.placement import PLACERS

#: The arm that the others are compared with.
REFERENCE = "saga+saga"
DEFAULT = (
    REFERENCE,
    "saga+round_robin",
    "saga+session",
    "stock+vllm-router-cache_aware",
    "stock+vllm-router-consistent_hash",
    "stock+sglang-router-cache_aware",
)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """`scheduler` (stock, saga, or a class path) in each replica, and `router` before them.

    A router is a policy of ours, or `PACKAGE-POLICY` of another's.
    """

    scheduler: str
    router: str | None = None

    @classmethod
    def parse(cls, name: str) -> Arrangement:
        """Read `scheduler` or `scheduler+router`.

        Raises:
            ValueError: there is no such router.
        """
        scheduler, plus, router = name.partition("+")
        if not scheduler or (plus and router not in PLACERS and find_peer(router) is None):
            peers = ", ".join(f"{package}-POLICY" for package in PEERS)
            raise ValueError(
                f"{name!r} is no arrangement: SCHEDULER+ROUTER, where ROUTER is one of "
                f"{', '.join(PLACERS)}, {peers}"
            )
        return cls(scheduler, router if plus else None)

    @property
    def name(self) -> str:
        return self.scheduler if self.router is None else f"{self.scheduler}+{self.router}"
