"""Built-in workloads: synthetic sessions drawn from published figures, seeded.

Nothing here is fitted to single sessions of a trace. A constant is a published figure, a quantile
of a public data set or an assumption of ours; every generator says which.

`swe`          coding agents as SAGA describes its SWE-bench workload
`web`          browser agents that replace the page in their context at every step
`claude-code`  interactive coding agents: human pauses, compactions, sub-agents, long contexts
`service`      customer service: a large shared prompt and tiny turns
`tenants`      SAGA's ten tenants, heavy, medium and light, with Poisson arrivals
"""

from __future__ import annotations

from vllm_saga.simulator.builtin import claude_code, service, swe, tenants, web
from vllm_saga.simulator.builtin.swe import MEAN_CALLS, sessions
from vllm_saga.simulator.trace import Session, TraceError

__all__ = ["MEAN_CALLS", "NAMES", "generate", "sessions"]

_GENERATORS = {
    "swe": swe.sessions,
    "web": web.sessions,
    "claude-code": claude_code.sessions,
    "service": service.sessions,
    "tenants": tenants.sessions,
}
NAMES = tuple(_GENERATORS)


def generate(name: str, count: int, seed: int = 0) -> list[Session]:
    """`count` sessions of the workload `name`; session k is the same whatever `count` is.

    Raises `TraceError` for a name that is not in `NAMES`.
    """
    if name not in _GENERATORS:
        raise TraceError(f"{name!r} is not a built-in workload; there are {', '.join(NAMES)}")
    return _GENERATORS[name](count, seed)
