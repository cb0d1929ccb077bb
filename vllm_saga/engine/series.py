"""The engine's metrics: what each is called, what it means, and the labels it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_saga.policy import tally
from vllm_saga.policy.hints import no_counts

PREFIX = "vllm:saga_"

_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_TASK_SECONDS = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21600.0)

ACTIVE = "active"
WORKFLOWS = "workflows"
SESSIONS = "sessions"
HELD_CALLS = "held_calls"
OLDEST_HOLD_S = "oldest_hold_seconds"
CAPACITY = "capacity_blocks"
USED = "used_blocks"
PROTECTED = "protected_blocks"
CLASSES = "agent_classes"
CALIBRATION = "gap_calibration"
JAIN = "fairness_jain"
TENANT_WAITING = "tenant_waiting"
TENANT_GPU_S = "tenant_gpu_seconds"
TENANT_POOL_S = "tenant_pool_seconds"
HINTS = "hints"
FAILURES = "policy_failures"

RUNNING, PROTECTED_STATE, HELD, AWAY = "running", "protected", "held", "away"


@dataclass(frozen=True, slots=True)
class Series:
    """One metric. `label` is its label beside vLLM's own; `values` those that are always there."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    buckets: tuple[float, ...] = ()


ALL = (
    Series(ACTIVE, "gauge", "1 = saga decides; 0 = this engine schedules as stock vLLM does."),
    Series(
        WORKFLOWS,
        "gauge",
        "Workflows: running = resident with a call in flight, protected = resident in a gap, "
        "held = waiting for residency, away = in a gap without residency.",
        "state",
        (RUNNING, PROTECTED_STATE, HELD, AWAY),
    ),
    Series(SESSIONS, "gauge", "Sessions that are remembered."),
    Series(HELD_CALLS, "gauge", "Calls held back."),
    Series(OLDEST_HOLD_S, "gauge", "Seconds for which the longest held workflow has been held."),
    Series(CAPACITY, "gauge", "KV blocks that residents may hold in all."),
    Series(USED, "gauge", "KV blocks that residents hold or are about to, unknown calls included."),
    Series(
        PROTECTED,
        "gauge",
        "KV blocks that residents keep through a gap; of a block that several share, their part.",
    ),
    Series(CLASSES, "gauge", "Agent classes that have been learned."),
    Series(
        CALIBRATION,
        "gauge",
        "How often gaps end when they were predicted to: 1 = as often as said, 0 = never.",
    ),
    Series(JAIN, "gauge", "Jain's index of tenants' service over weight: 1 = all alike."),
    Series(TENANT_WAITING, "gauge", "Workflows held, by tenant.", "tenant", ()),
    Series(TENANT_GPU_S, "counter", "GPU seconds of what tenants computed.", "tenant", ()),
    Series(TENANT_POOL_S, "counter", "What tenants held, KV pools x seconds.", "tenant", ()),
    Series(
        tally.HOLDS,
        "counter",
        "Calls held back: no_room = they did not fit, in_line = others were waiting.",
        "reason",
        (tally.NO_ROOM, tally.IN_LINE),
    ),
    Series(
        tally.HOLD_S,
        "histogram",
        "Seconds for which workflows were held, at the end of the hold: new ones, and those that "
        "had made a call.",
        "workflow",
        (tally.NEW, tally.BEGUN),
        _SECONDS,
    ),
    Series(tally.FORCED, "counter", "Holds that ended by their deadline, in a full pool."),
    Series(tally.ABORTED, "counter", "Calls that ended while they were held: clients gave up."),
    Series(
        tally.LOST_PLACE,
        "counter",
        "Residents that lost their place: gave_way to who waits, for an idle_engine, or displaced "
        "because residents outgrew the pool.",
        "reason",
        (tally.GAVE_WAY, tally.IDLE_ENGINE, tally.DISPLACED),
    ),
    Series(
        tally.RESUMED_TOKENS,
        "counter",
        "Tokens of calls that their session had computed before: hit = still cached, lost = "
        "computed again.",
        "cache",
        (tally.HIT, tally.LOST),
    ),
    Series(
        tally.GAP_S,
        "histogram",
        "Seconds between two calls of a workflow.",
        buckets=_SECONDS,
    ),
    Series(
        tally.GAP_ERROR_S,
        "histogram",
        "By how many seconds a workflow returned sooner or later than the median predicted.",
        "returned",
        (tally.SOONER, tally.LATER),
        _SECONDS,
    ),
    Series(
        tally.TASK_S,
        "histogram",
        "Seconds from a workflow's first call to the end of its last; its end may be presumed.",
        buckets=_TASK_SECONDS,
    ),
    Series(tally.ENDED, "counter", "Sessions that a client declared over."),
    Series(
        HINTS, "counter", "Hints of clients, by what became of them.", "outcome", tuple(no_counts())
    ),
    Series(FAILURES, "counter", "Bugs in the policy; after one the engine schedules as stock."),
)
