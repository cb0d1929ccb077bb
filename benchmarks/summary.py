"""What a sweep has shown, on one page: who is best where, and where saga is not."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from vllm_saga.simulator import plots
from vllm_saga.simulator.policies import ROOMY
from vllm_saga.simulator.ratios import TIE
from vllm_saga.simulator.result import RunResult

#: Policies that look into the future or have a pool for everything: no rivals.
REFERENCES = ("farthest-next-use", "saga-oracle", "saga-farthest", ROOMY)
OURS = "saga"
#: The same with less, or with something false, to go by.
VARIANTS = ("saga-ends", "saga-lineage", "saga-toolless", "saga-hinted", "saga-misled")
STOCK = "vllm"

Json = dict[str, Any]


def pictures_of_point(results: Sequence[RunResult], directory: Path) -> None:
    """CDFs and KV memory of one point, of the lowest seed's runs of a few telling policies."""
    telling = [r for r in results if r.policy in (STOCK, "thunderagent", "saga-paper", OURS)]
    plots.plot(telling or list(results), directory)


def write(output: Path) -> None:
    """`summary.md` and one collapse curve per workload and kind of load, from all points."""
    points = [json.loads(path.read_text()) for path in sorted((output / "points").glob("*.json"))]
    lines = ["# Sweep", "", *_legend(points), ""]
    for name, own in _by_workload(points).items():
        config = own[0]["config"]
        lines += [
            f"## {name}: {config['title']}", "",
            f"{config['trace']}, {config['sessions']} sessions a run, {config['seeds']} seeds.", "",
        ]  # fmt: skip
        for kind in ("overcommit", "open"):
            chosen = sorted((p for p in own if _kind(p) == kind), key=_load)
            if chosen:
                picture = f"{name}-{kind}.png"
                _curve(chosen, output / picture, kind)
                lines += [*_table(chosen), "", f"![{name}, {kind}]({picture})", ""]
    points = [point for point in points if _runs(point, OURS)]
    if points:
        lines += ["## Where saga is not first", "", *_not_first(points), ""]
        lines += ["## Where we stop helping", "", *_no_help(points), ""]
        lines += ["## Throughput", "", *_throughput(points), ""]
        lines += ["## Over all points", "", *_overall(points), ""]
    (output / "summary.md").write_text("\n".join(lines))


def _by_workload(points: Sequence[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = defaultdict(list)
    for point in points:
        found[point["config"]["workload"]].append(point)
    return found


def _legend(points: Sequence[Json]) -> Iterable[str]:
    config = points[0]["config"] if points else {}
    yield (
        f"{config.get('hardware')}: {config.get('kv_tokens'):,} KV tokens. "
        "Each cell: how many times shorter the mean task completion is than stock vLLM's "
        "(above 1 is better), and in brackets the p99 step wait in seconds. "
        f"Differences under {TIE:.0%} are ties. "
        f"Offline references, no rivals: {', '.join(REFERENCES)}; the static cap was searched on "
        "the same work."
    )


def _table(points: Sequence[Json]) -> Iterable[str]:
    yield "| policy | " + " | ".join(_load_text(point) for point in points) + " |"
    yield "|---|" + "---:|" * len(points)
    for policy in _policies(points):
        cells = [_cell(point, policy) for point in points]
        yield f"| {policy} | " + " | ".join(cells) + " |"
    best = [_best_rival(point) for point in points]
    yield "| *strongest rival* | " + " | ".join(name for name, _ in best) + " |"
    gains = [
        mean / _mean(point, OURS) if _runs(point, OURS) else None
        for point, (_, mean) in zip(points, best, strict=True)
    ]
    cells = ["" if gain is None else f"**{gain:.2f}x**" for gain in gains]
    yield "| **saga against it** | " + " | ".join(cells) + " |"


def _cell(point: Json, policy: str) -> str:
    name = _named(point, policy)
    if name is None:
        return ""
    gain = _mean(point, STOCK) / _mean(point, name)
    wait = _average(point, name, "step_wait_s", "p99")
    unfinished = sum(run["unfinished"] for run in _runs(point, name))
    text = f"{gain:.2f} ({wait:.1f})"
    return text + f" {unfinished} unfinished" if unfinished else text


def _not_first(points: Sequence[Json]) -> Iterable[str]:
    found = False
    for point in points:
        rival, mean = _best_rival(point)
        gain = mean / _mean(point, OURS)
        if gain < 1 - TIE:
            found = True
            yield f"* {_name(point)}: {rival} is {1 / gain:.2f}x better in mean task completion."
    if not found:
        yield "Nowhere by more than a tie."


def _no_help(points: Sequence[Json]) -> Iterable[str]:
    found = False
    for point in points:
        gain = _mean(point, STOCK) / _mean(point, OURS)
        if gain < 1 + TIE:
            yield f"* {_name(point)}: {gain:.2f}x of stock."
            found = True
    if not found:
        yield "Nowhere in these points."


def _throughput(points: Sequence[Json]) -> Iterable[str]:
    """Tasks a minute at each policy's own best load: what holding back must not cost."""
    yield (
        "Tasks a minute: of stock and of saga at the best load of each, and saga against the "
        "static cap that was searched on the same work, at the load where it compares worst."
    )
    yield ""
    yield "| | stock | saga | saga / stock | saga / static cap, worst |"
    yield "|---|---:|---:|---:|---:|"
    for name, own in _by_workload(points).items():
        stock, ours = (max(_tasks(point, policy) for point in own) for policy in (STOCK, OURS))
        capped = [
            _tasks(point, OURS) / _tasks(point, cap)
            for point in own
            if (cap := _named(point, "static-cap:auto")) is not None
        ]
        worst = f"{min(capped):.2f}x" if capped else ""
        yield f"| {name} | {stock:.3f} | {ours:.3f} | {ours / stock:.2f}x | {worst} |"


def _tasks(point: Json, policy: str) -> float:
    return _average(point, policy, "tasks_per_min")


def _overall(points: Sequence[Json]) -> Iterable[str]:
    rivals = [_best_rival(point)[1] for point in points]
    gains = [mean / _mean(point, OURS) for point, mean in zip(points, rivals, strict=True)]
    stock = [_mean(point, STOCK) / _mean(point, OURS) for point in points]
    yield (
        f"{len(points)} points. Against the strongest rival of each point: geometric mean "
        f"{geometric_mean(gains):.2f}x, worst {min(gains):.2f}x. Against stock: geometric mean "
        f"{geometric_mean(stock):.2f}x, worst {min(stock):.2f}x."
    )
    if all(_runs(point, ROOMY) for point in points):
        most = [mean / _mean(point, ROOMY) for point, mean in zip(points, rivals, strict=True)]
        yield ""
        yield (
            f"Bound: a pool that holds everything ({ROOMY}) would be {geometric_mean(most):.2f}x "
            "ahead of the strongest rivals."
        )


def _curve(points: Sequence[Json], path: Path, kind: str) -> None:
    runs: dict[str, list[tuple[float, Json]]] = defaultdict(list)
    for point in points:
        for run in point["runs"]:
            runs[plain(run["policy"])].append((_load(point), run))
    label = "working set / KV pool" if kind == "overcommit" else "% of stock's saturation"
    plots.collapse_curve(runs, path, load_label=label)


def _best_rival(point: Json) -> tuple[str, float]:
    """The policy other than ours and the references with the least mean task completion."""
    rivals = {
        run["policy"]
        for run in point["runs"]
        if run["policy"] not in REFERENCES and not run["policy"].startswith(VARIANTS)
    } - {OURS}
    means = {name: _mean(point, name) for name in sorted(rivals)}
    best = min(means, key=means.__getitem__)
    return best, means[best]


def _mean(point: Json, policy: str) -> float:
    return _average(point, policy, "task_completion_s", "mean")


def _average(point: Json, policy: str, *keys: str) -> float:
    values = []
    for run in _runs(point, policy):
        value: Any = run
        for key in keys:
            value = value[key]
        values.append(math.nan if value is None else value)
    return fmean(values) if values else math.nan


def _runs(point: Json, policy: str) -> list[Json]:
    return [run for run in point["runs"] if run["policy"] == policy]


def _policies(points: Sequence[Json]) -> list[str]:
    found = dict.fromkeys(plain(run["policy"]) for p in points for run in p["runs"])
    return sorted(found, key=lambda name: (name == OURS, name in REFERENCES, name != STOCK))


def _named(point: Json, policy: str) -> str | None:
    """The policy's name in this point."""
    return next((run["policy"] for run in point["runs"] if plain(run["policy"]) == policy), None)


def plain(policy: str) -> str:
    """The policy as it is asked for: the cap that was found differs from point to point."""
    return "static-cap:auto" if policy.startswith("static-cap:") else policy


def _kind(point: Json) -> str:
    return str(point["config"]["load"]).partition("-")[0]


def _load(point: Json) -> float:
    return float(str(point["config"]["load"]).partition("-")[2].removeprefix("auto"))


def _load_text(point: Json) -> str:
    return f"{_load(point):g}" if _kind(point) == "overcommit" else f"{_load(point):g} %"


def _name(point: Json) -> str:
    return f"{point['config']['workload']}, {_kind(point)} {_load_text(point)}"
