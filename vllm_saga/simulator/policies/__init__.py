"""Every way to run the cluster that can be compared, by the name the command line gives it."""

from __future__ import annotations

from collections.abc import Callable

from vllm_saga.simulator.policies.base import ClusterView, Policy
from vllm_saga.simulator.policies.saga import Saga, SagaLineage
from vllm_saga.simulator.policies.saga_oracle import SagaOracle
from vllm_saga.simulator.policies.session_age import SessionAge
from vllm_saga.simulator.policies.static_cap import StaticCap

PolicyMaker = Callable[[ClusterView], Policy]

#: name -> maker, for policies without a parameter.
PLAIN: dict[str, PolicyMaker] = {
    "vllm": Policy,
    "vllm-priority": SessionAge,
    "saga": Saga,
    "saga-lineage": SagaLineage,
    "saga-oracle": SagaOracle,
}
#: name -> (parameter's letter, its type, maker): written `name:VALUE`.
WITH_PARAMETER: dict[str, tuple[str, type[int] | type[float], Callable[..., Policy]]] = {
    "static-cap": ("N", int, StaticCap),
}
BASELINE = "vllm"


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
        if not parameter > 0:
            raise UnknownPolicy(f"{name!r}: {head} needs a number above 0, as {head}:{letter}")
        return lambda cluster: make(cluster, parameter)
    raise UnknownPolicy(f"{name!r} is no policy. Known: {', '.join(names())}")


def names() -> list[str]:
    """All policies as the command line writes them."""
    return [*PLAIN, *(f"{head}:{letter}" for head, (letter, _, _) in WITH_PARAMETER.items())]
