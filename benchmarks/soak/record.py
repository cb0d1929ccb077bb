"""What is measured of a soak: memory, tables and counters over time, and what must hold of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

#: Tables that have to be empty once everything has ended or expired; `classes` are kept, bounded.
TABLES = ("resident", "held", "calls", "sessions", "idle", "lineage", "ledger_blocks")
#: A process is flat if its median memory in the last quarter of the run is above that in the
#: second by no more than this share of it and so many bytes: what an allocator keeps varies.
FLAT_SHARE, FLAT_BYTES = 0.02, 4 << 20
_PREFIX = "vllm:saga_"


@dataclass(frozen=True)
class Sample:
    """One look at all processes. at_s: since the agents began; rss_bytes: by process."""

    at_s: float
    rss_bytes: dict[str, int]
    tables: dict[str, int]
    metrics: dict[str, float]
    client: dict[str, int]


def wanted(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of all of /metrics what a soak keeps."""
    names = ("vllm:num_requests_", "vllm:request_success", "vllm:num_preemptions", "saga_router_")
    kept = (_PREFIX, *names)
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(kept) and not name.endswith(("_bucket", "_created"))
    }


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """By process: median bytes in the second and in the last quarter, and whether it is flat."""
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[3 * quarter :]
    found = {}
    for name in samples[-1].rss_bytes:
        before, after = (
            median([s.rss_bytes[name] for s in part if name in s.rss_bytes] or [0])
            for part in (second, last)
        )
        flat = after - before <= FLAT_SHARE * before + FLAT_BYTES
        found[name] = {"second_quarter": before, "last_quarter": after, "flat": flat}
    return found


def problems(samples: Sequence[Sample], last: Sample, errors: Sequence[str]) -> list[str]:
    """What does not hold; empty if all is well. last: when all has ended and expired."""
    wrong = [
        f"memory of {name} grows: {each['second_quarter']:.0f} -> {each['last_quarter']:.0f} bytes"
        for name, each in growth(samples).items()
        if not each["flat"]
    ]
    gone = set(samples[0].rss_bytes) ^ set(last.rss_bytes)
    wrong += [f"a process came or went: {name}" for name in sorted(gone)]
    wrong += [f"table {name}: {last.tables[name]} left" for name in TABLES if last.tables[name]]
    return wrong + _unbalanced(last) + [f"a call has failed: {error}" for error in errors]


def _unbalanced(last: Sample) -> list[str]:
    client, engine = last.client, last.metrics
    ours = {name: engine.get(f"{_PREFIX}{name}", 0.0) for name in (
        "holds_total", "holds_aborted_total", "hold_seconds_count", "sessions_ended_total",
        "policy_failures_total", "held_calls", "active",
    )}  # fmt: skip
    served = engine.get("vllm:request_success_total", 0.0)
    done = client["answered"] + client["aborted"] + client["refused"] + client["failed"]
    released = ours["hold_seconds_count"] + ours["holds_aborted_total"]
    rules = {
        f"begun {client['begun']} = answered, aborted, refused or failed {done}": (
            client["begun"] == done
        ),
        f"answered {client['answered']} <= finished in vLLM {served:.0f} <= begun": (
            client["answered"] <= served <= client["begun"] + client["probes"]
        ),
        # Calls of one workflow are held together, and released together: as one.
        f"held calls {ours['holds_total']:.0f} >= released or withdrawn {released:.0f}": (
            ours["holds_total"] >= released
        ),
        "something was held": ours["hold_seconds_count"] > 0,
        "nothing is held": ours["held_calls"] == 0,
        f"ended sessions {ours['sessions_ended_total']:.0f} = those that we ended "
        f"{client['ended'] + client['last']}": (
            ours["sessions_ended_total"] == client["ended"] + client["last"]
        ),
        "saga is on, and its policy has not failed": (
            ours["active"] == 1 and ours["policy_failures_total"] == 0
        ),
        "vLLM has no requests left": (
            engine["vllm:num_requests_running"] == engine["vllm:num_requests_waiting"] == 0
        ),
        "the router has no calls, bodies or sessions left": not any(
            engine.get(f"saga_router_{name}", 0.0)
            for name in ("in_flight", "buffered_bytes", "sessions")
        ),
    }
    return [f"does not hold: {rule}" for rule, holds in rules.items() if not holds]


def document(
    samples: Sequence[Sample], last: Sample, wrong: Sequence[str], **about: Any
) -> dict[str, Any]:
    return {
        **about,
        "criterion": f"median of the last quarter <= {1 + FLAT_SHARE} x that of the second "
        f"+ {FLAT_BYTES} bytes, for each process",
        "problems": list(wrong),
        "memory": growth(samples),
        "last": asdict(last),
        "samples": [asdict(sample) for sample in samples],
    }


def plot(samples: Sequence[Sample], last: Sample, path: Path) -> None:
    """Memory of each process, and the sizes of the tables, over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = [*samples, last]
    minutes = [sample.at_s / 60 for sample in every]
    figure, (memory, tables) = plt.subplots(2, 1, sharex=True, figsize=(9, 7))
    for name in sorted(samples[0].rss_bytes):
        values = [sample.rss_bytes.get(name, 0) / 2**20 for sample in every]
        memory.plot(minutes, values, label=name.rpartition(" ")[0])
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(bottom=0)
    for name in (*TABLES, "classes"):
        tables.plot(minutes, [sample.tables[name] for sample in every], label=name)
    tables.set_ylabel("entries")
    tables.set_xlabel("minutes")
    tables.set_yscale("symlog", linthresh=10)
    for axis in (memory, tables):
        axis.legend(fontsize="small", ncols=2)
        axis.grid(alpha=0.3)
    tables.axvline(samples[-1].at_s / 60, color="grey", linestyle=":")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
