#!/usr/bin/env python3
"""The upstream gate: vLLM's own scheduler tests must end the same with our class in its place.

Runs the chosen files of the installed vLLM version's test suite stock, swapped (swap_plugin.py) and
stock with patches/ applied, and compares every test's outcome. Needs PyPI the first time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path

from sources import (
    CACHE,
    REPO,
    SourceError,
    clean_environment,
    fetch_tests,
    has_patches,
    make_patched_copy,
    make_stand_ins,
)

CORE = [
    "tests/v1/core/test_scheduler.py",
    "tests/v1/core/test_async_scheduler.py",
    "tests/v1/core/test_prefix_caching.py",
    "tests/v1/core/test_prefix_replay.py",
    "tests/v1/core/test_priority_preemption_bug.py",
    "tests/v1/core/test_deferred_block_free.py",
    "tests/v1/core/test_mamba_align_chunk_split.py",
    "tests/v1/core/test_swa_inflight_window_free.py",
    "tests/v1/core/test_worker_slot_overflow.py",
    "tests/v1/core/prefix_cache/test_mamba_eagle_resume_checkpoint.py",
    "tests/v1/core/prefix_cache/test_partial_prefix_cache_hits.py",
    "tests/v1/streaming_input/test_scheduler_streaming.py",
    "tests/v1/kv_connector/unit/test_cache_pollution_prevention.py",
    "tests/v1/kv_connector/unit/test_error_propagation.py",
    "tests/v1/kv_connector/unit/test_invalid_blocks_correctness.py",
    "tests/v1/kv_connector/unit/test_kv_load_failure_recovery.py",
    "tests/v1/kv_connector/unit/test_remote_decode_lifecycle.py",
    "tests/v1/kv_connector/unit/test_remote_prefill_lifecycle.py",
]
FULL = [
    *CORE,
    "tests/v1/core/test_contiguous_kv_packing.py",
    "tests/v1/core/test_encoder_cache_manager.py",
    "tests/v1/core/test_kv_cache_metrics.py",
    "tests/v1/core/test_kv_cache_utils.py",
    "tests/v1/core/test_kv_sharing.py",
    "tests/v1/core/test_output.py",
    "tests/v1/core/test_repetition_detection.py",
    "tests/v1/core/test_single_type_kv_cache_manager.py",
    "tests/v1/core/prefix_cache/test_partial_prefix_cache_primitives.py",
    "tests/v1/ec_connector/unit/test_ec_transfer_params.py",
    "tests/v1/kv_connector/unit/offloading_connector",
    "tests/v1/kv_connector/unit/test_decode_bench_connector.py",
    "tests/v1/kv_connector/unit/test_kv_connector_lifecycle.py",
    "tests/v1/kv_connector/unit/test_multi_connector.py",
    "tests/v1/kv_connector/unit/test_nixl_connector_hma.py",
    "tests/v1/kv_connector/unit/test_nixl_simple_cpu_offload.py",
    "tests/v1/kv_connector/unit/test_scheduler_kv_connector_override.py",
    "tests/v1/kv_connector/unit/test_simple_cpu_offload_connector.py",
    "tests/v1/simple_kv_offload/test_kv_events.py",
    "tests/v1/simple_kv_offload/test_scheduler.py",
    "tests/v1/spec_decode/test_dynamic_sd.py",
    # 12 random runs of 20 000 steps each, with priorities and preemptions
    "tests/v1/core/test_priority_scheduler_random.py",
]
#: Runs and their mode (swap_plugin.py); the last two are those on a patched vLLM.
RUNS = {"stock": "stock", "saga": "saga", "patched": "stock", "hooks": "saga"}
SHOWN = ["passed", "failed", "error", "skipped", "xfailed", "xpassed"]


@dataclass(frozen=True)
class Result:
    outcomes: dict[str, str]
    made: dict[str, int]
    policy_failures: list[str]
    seconds: float
    hooks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Gate:
    """What every run has in common: vLLM's test files, model stand-ins, and whether to stress.

    reports: the folder for outcomes and logs.
    """

    files: list[str]
    redirects: Path
    stress: bool = False
    reports: Path = CACHE


def run_pytest(name: str, source: Path, gate: Gate) -> Result:
    """One run of vLLM's tests in `source`; with the package `vllm` there, if there is one.

    name: of the run, one of `RUNS`.
    """
    report = gate.reports / f"{name}.json"
    report.unlink(missing_ok=True)
    log = gate.reports / f"{name}.log"
    env = clean_environment() | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (source, Path(__file__).parent, REPO))),
        "SAGA_UPSTREAM_MODE": RUNS[name],
        "SAGA_UPSTREAM_REPORT": str(report),
        "SAGA_UPSTREAM_STRESS": str(int(gate.stress)),
        "VLLM_MODEL_REDIRECT_PATH": str(gate.redirects),
    }
    if gate.stress:
        config = gate.reports / "stress.json"
        config.write_text('{"residency": false}')
        env["SAGA_CONFIG"] = str(config)
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "--rootdir", str(source)]
    command += ["-p", "swap_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--timeout", "900", "--tb", "native", "-q", *gate.files]
    started = time.monotonic()
    with log.open("w") as out:
        done = subprocess.run(command, cwd=source, env=env, stdout=out, stderr=out)
    if not report.exists():
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SourceError(f"pytest ({name}) ended early with status {done.returncode}:\n{tail}")
    return Result(**json.loads(report.read_text()), seconds=time.monotonic() - started)


def differences(stock: Result, other: Result, name: str) -> list[str]:
    """Every test that ended differently, one line each."""
    found = []
    for test in sorted(stock.outcomes.keys() | other.outcomes.keys()):
        before = stock.outcomes.get(test, "not run")
        after = other.outcomes.get(test, "not run")
        if before != after:
            found.append(f"{test}: stock {before}, {name} {after}")
    return found


def patched_problems(stock: Result, patched: Result, name: str = "patched") -> list[str]:
    """What makes the gate fail for a run with patches, one line each."""
    found = differences(stock, patched, name)
    if not patched.hooks or stock.hooks:
        found.append(f"{name}: the patches were not what made the difference")
    return found


def problems(stock: Result, saga: Result) -> list[str]:
    """Everything that makes the gate fail, one line each."""
    found = differences(stock, saga, "saga")
    found += [f"policy failure in {failure}" for failure in saga.policy_failures]
    if "passed" not in stock.outcomes.values():
        found.append("no test passed with the stock scheduler: the gate compared nothing")
    if not saga.made["saga"]:
        found.append("the swap did not happen: no saga scheduler was made")
    elif not saga.made["saga on"]:
        found.append("saga was off in every scheduler made: the gate compared stock with stock")
    return found


def print_table(results: dict[str, Result]) -> None:
    print(f"{'':8}" + "".join(f"{name:>9}" for name in SHOWN) + f"{'time':>9}")
    for name, result in results.items():
        counts = Counter(result.outcomes.values())
        row = "".join(f"{counts[outcome]:9}" for outcome in SHOWN)
        print(f"{name:8}{row}{result.seconds:7.0f} s")
    saga = results["saga"]
    print(
        f"schedulers made: {results['stock'].made['stock']} stock; {saga.made['saga']} saga, "
        f"of which {saga.made['saga on']} with saga on"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every file, not only the quick core")
    parser.add_argument(
        "--stress",
        action="store_true",
        default=os.environ.get("SAGA_UPSTREAM_STRESS") == "1",
        help="sessions everywhere, saga always on, no holds (also: SAGA_UPSTREAM_STRESS=1)",
    )
    parser.add_argument(
        "--hooks",
        action="store_true",
        default=os.environ.get("SAGA_TEST_PATCHES") == "1",
        help="also saga on a patched vLLM, whose hooks it uses (also: SAGA_TEST_PATCHES=1)",
    )
    parser.add_argument("--unpatched", action="store_true", help="no run on a patched vLLM")
    parser.add_argument("--reports", type=Path, default=CACHE, help="folder for outcomes and logs")
    parser.add_argument("files", nargs="*", help="run these upstream tests instead")
    args = parser.parse_args()
    if args.unpatched and args.hooks:
        parser.error("--hooks is a run on a patched vLLM: leave out it or --unpatched")
    args.reports = args.reports.absolute()
    return args


def main() -> int:
    args = parse_args()
    version = installed_version("vllm").partition("+")[0]
    chosen = "chosen files" if args.files else "full set" if args.full else "core set"
    stress = ", stress" if args.stress else ""
    patched = has_patches(version) and not args.unpatched
    try:
        source = fetch_tests(version)
        files = args.files or existing(source, FULL if args.full else CORE)
        print(f"upstream gate: vLLM {version}, {chosen}{stress} ({len(files)} paths)", flush=True)
        args.reports.mkdir(parents=True, exist_ok=True)
        gate = Gate(files, make_stand_ins(), args.stress, args.reports)
        results = {name: run_pytest(name, source, gate) for name in ("stock", "saga")}
        if patched:
            results |= run_patched(
                source, gate, ("patched", "hooks") if args.hooks else ("patched",)
            )
    except SourceError as error:
        print(f"upstream gate: error: {error}", file=sys.stderr)
        return 1
    print_table(results)
    stock = results["stock"]
    found = problems(stock, results["saga"])
    if "patched" in results:
        found += patched_problems(stock, results["patched"])
    elif not args.unpatched:
        print(f"no patches for vLLM {version}: no patched run")
    if "hooks" in results:
        found += patched_problems(stock, results["hooks"], "hooks")
        found += [f"hooks: {line}" for line in problems(stock, results["hooks"])]
    for line in found[:50]:
        print(f"  {line}")
    if found:
        print(f"upstream gate: FAILED, {len(found)} problems; logs: {args.reports}/*.log")
        return 1
    print(f"upstream gate: ok, {len(stock.outcomes)} outcomes identical in {len(results)} runs")
    return 0


def existing(source: Path, files: list[str]) -> list[str]:
    """Those that this version has: older ones have fewer.

    Raises:
        SourceError: it has none.
    """
    found = [name for name in files if (source / name).exists()]
    if not found:
        raise SourceError(f"{source} has none of the chosen tests; remove it to fetch it again")
    return found


def run_patched(source: Path, gate: Gate, names: tuple[str, ...]) -> dict[str, Result]:
    """The runs on a patched copy of the installed vLLM."""
    installed = importlib.util.find_spec("vllm")
    assert installed is not None and installed.origin is not None
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        copy = make_patched_copy(Path(folder), Path(installed.origin).parent, source)
        return {name: run_pytest(name, copy, gate) for name in names}


if __name__ == "__main__":
    sys.exit(main())
