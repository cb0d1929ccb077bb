"""The workloads W1-W7 that every policy is measured on, from trace files or built in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_saga.simulator import formats
from vllm_saga.simulator.hardware import Hardware
from vllm_saga.simulator.load import Load
from vllm_saga.simulator.runner import Experiment
from vllm_saga.simulator.trace import Session, TraceError


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload: its trace file, and the built-in generator that stands in for it.

    max_context: longer sessions are left out, tokens. max_gap_s: longer gaps are cut.
    """

    title: str
    files: tuple[str, ...]
    builtin: str
    max_context: int | None = None
    max_gap_s: float | None = None


WORKLOADS = {
    "W1": Workload("SWE-agent, quick tools", ("sweagent_glm45_timed.jsonl",), "swe"),
    "W2": Workload("Claude Code, timed tools", ("claudecode_swe_timed.jsonl",), "claude-code"),
    "W3": Workload("browser agents, edited contexts", ("web_browser_agents.jsonl",), "web"),
    "W4": Workload(
        "interactive coding, human gaps", ("weka_cc_dev.jsonl",), "claude-code", 131_072, 60.0
    ),
    "W5": Workload("customer service", ("tau2_customer_service.jsonl",), "service"),
    "W6": Workload("ten tenants", (), "tenants"),
    "W7": Workload(
        "out of distribution", ("sweagent_java_ctxedit.jsonl", "multiagent_groupchat.jsonl"), "web"
    ),
}


def question(
    name: str, trace: Sequence[Session], load: Load, engine: Hardware, sessions: int
) -> Experiment:
    """A workload's sessions, cut as it says, under a load on `engine`; so many of them per run."""
    workload = WORKLOADS[name]
    return Experiment(
        tuple(trace), load, engine, sessions, max_gap_s=workload.max_gap_s,
        max_context=workload.max_context,
    )  # fmt: skip


def load(name: str, traces: Path | None, count: int) -> tuple[list[Session], str]:
    """The sessions of a workload and where they come from; built in where there is no file."""
    workload = WORKLOADS[name]
    files = [traces / file for file in workload.files] if traces else []
    found = [file for file in files if file.exists()]
    if traces and files and not found:
        raise TraceError(f"{traces}: has none of {', '.join(workload.files)} ({name})")
    if not found:
        source = f"{formats.PREFIX}{workload.builtin}"
        return formats.load(source, 2 * count), source
    sessions = [session for file in found for session in formats.load(file, None, 0)]
    return sessions, " + ".join(file.name for file in found)
