"""Every way to run the cluster that can be compared, by the name the command line gives it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.policies.continuum import Continuum
from vllm_saga.simulator.policies.farthest_next_use import FarthestNextUse
from vllm_saga.simulator.policies.fixed_ttl import FixedTTL
from vllm_saga.simulator.policies.kvflow import KVFlow
from vllm_saga.simulator.policies.plas import Plas
from vllm_saga.simulator.policies.saga import Saga, SagaLineage
from vllm_saga.simulator.policies.saga_farthest import SagaFarthest
from vllm_saga.simulator.policies.saga_hints import (
    SagaEnds,
    SagaHinted,
    SagaMisled,
    SagaToolless,
)
from vllm_saga.simulator.policies.saga_oracle import SagaOracle
from vllm_saga.simulator.policies.saga_paper import SagaPaper
from vllm_saga.simulator.policies.session_age import SessionAge
from vllm_saga.simulator.policies.static_cap import StaticCap
from vllm_saga.simulator.policies.thunderagent import ThunderAgent

PolicyMaker = Callable[[ClusterView], Policy]

BASELINE = "vllm"
#: No policy, but a reference: stock on engines whose KV pool holds all that a run computes.
ROOMY = "vllm-roomy"

#: name -> maker, for policies without a parameter.
PLAIN: dict[str, PolicyMaker] = {
    BASELINE: Policy,
    "vllm-priority": SessionAge,
    "thunderagent": ThunderAgent,
    "thunderagent-origin": partial(ThunderAgent, origin_only=True),
    "thunderagent-chars": partial(ThunderAgent, from_chars=True),
    "continuum": Continuum,
    "kvflow": KVFlow,
    "plas": Plas,
    "saga-paper": SagaPaper,
    "farthest-next-use": FarthestNextUse,
    "saga": Saga,
    "saga-lineage": SagaLineage,
    "saga-ends": SagaEnds,
    "saga-toolless": SagaToolless,
    "saga-hinted": SagaHinted,
    "saga-misled": SagaMisled,
    "saga-oracle": SagaOracle,
    "saga-farthest": SagaFarthest,
    ROOMY: Policy,
}
#: name -> (parameter's letter, its type, maker): written `name:VALUE`.
WITH_PARAMETER: dict[str, tuple[str, type[int] | type[float], Callable[..., Policy]]] = {
    "static-cap": ("N|auto", int, StaticCap),
    "fixed-ttl": ("S", float, FixedTTL),
}


class UnknownPolicy(ValueError):
    """No such policy; the message lists those there are."""


def maker(name: str) -> PolicyMaker:
    """What makes the policy called `name`, for example `saga` or `static-cap:14`."""
    if name in PLAIN:
        return PLAIN[name]
    head, _, value = name.partition(":")
    if head in WITH_PARAMETER:
        letter, kind, make = WITH_PARAMETER[head]
        try:
            parameter = kind(value)
        except ValueError:
            parameter = kind(0)
        if not 0 < parameter < float("inf"):
            raise UnknownPolicy(f"{name!r}: {head} needs a number above 0, as {head}:{letter}")
        return lambda cluster: make(cluster, parameter)
    raise UnknownPolicy(f"{name!r} is no policy. Known: {', '.join(names())}")


def names() -> list[str]:
    """All policies as the command line writes them."""
    return [*PLAIN, *(f"{head}:{letter}" for head, (letter, _, _) in WITH_PARAMETER.items())]
