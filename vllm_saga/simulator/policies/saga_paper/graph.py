"""Agent execution graphs learned from what agents did (tier B of the SAGA paper, its 3.4)."""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_saga.policy.graph import reuse_probability
from vllm_saga.simulator import trace
from vllm_saga.simulator.hardware import Hardware, call_alone_s
from vllm_saga.simulator.policies.saga_paper.formulas import (
    COLD_START,
    CONFIDENCE,
    P_TERM,
)

NO_TOOL = "NONE"
_END = ""
#: Fewer latencies than this have no 95th percentile short of the longest.
_MIN_LATENCIES = 20


def tool_of(call: trace.Call) -> str:
    """The node type of a call: the set of tools it invokes."""
    if not call.tool:
        return NO_TOOL
    return "+".join(sorted(set(call.tool.split("+"))))


@dataclass(slots=True)
class Run:
    """One agent at work: the main thread of a session, or a sub-agent.

    Seconds: `work_s` of its calls alone on an idle engine, `gaps_s` between them.
    """

    types: tuple[str, ...]
    steps: int = 0
    work_s: float = 0.0
    gaps_s: float = 0.0
    tool: str | None = None
    ended_s: float = 0.0


@dataclass(slots=True)
class AgentType:
    """What finished runs of one type of agent teach about the next."""

    runs: int = 0
    steps: int = 0
    work_s: float = 0.0
    completion_s: float = 0.0
    _lengths: list[int] = field(default_factory=list)
    _sums: list[int] = field(default_factory=lambda: [0])
    _next: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    _new_tokens: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    _latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _all_latencies: list[float] = field(default_factory=list)

    @property
    def active(self) -> bool:
        return self.runs >= COLD_START

    @property
    def expected_completion_s(self) -> float:
        """Mean seconds of a run that never waits."""
        return self.completion_s / self.runs

    def observe_step(self, before: str, after: str, new_tokens: int) -> None:
        """A step with tool `after` followed one with tool `before`, with so much new prompt."""
        self._next[before][after] += 1
        total = self._new_tokens.setdefault((before, after), [0.0, 0.0])
        total[0] += new_tokens
        total[1] += 1

    def observe_latency(self, tool: str, seconds: float) -> None:
        insort(self._latencies[tool], seconds)
        insort(self._all_latencies, seconds)

    def observe_end(self, run: Run) -> None:
        if run.tool is not None:
            self._next[run.tool][_END] += 1
        self.runs += 1
        self.steps += run.steps
        self.work_s += run.work_s
        self.completion_s += run.work_s + run.gaps_s
        insort(self._lengths, run.steps)
        self._sums = [0, *itertools.accumulate(self._lengths)]

    def latencies(self, tool: str) -> list[float]:
        """Ascending, seconds; of all tools while there are few of this one."""
        own = self._latencies.get(tool, [])
        return own if len(own) >= _MIN_LATENCIES else self._all_latencies

    def steps_left(self, done: int) -> float:
        """Mean steps still to come in runs that got further than this; 1 if none did."""
        shorter = bisect_right(self._lengths, done)
        longer = len(self._lengths) - shorter
        if not longer:
            return 1.0
        return (self._sums[-1] - self._sums[shorter]) / longer - done

    @property
    def step_work_s(self) -> float:
        """Mean GPU seconds of a step."""
        return self.work_s / max(self.steps, 1)

    def work_left_s(self, done: int) -> float:
        """GPU seconds of the steps still to come."""
        return self.steps_left(done) * self.step_work_s

    def reuse(self, tool: str, done: int, cached_tokens: int) -> float:
        """Eq 4 on the linear graph through the most frequent successor, if it is confident.

        If it is not, the agent goes on with its tool as long as steps are expected.
        """
        seen = self._next.get(tool)
        if seen:
            successor, count = seen.most_common(1)[0]
            if count / seen.total() >= CONFIDENCE:
                if successor == _END:
                    return 0.0
                new = self._expected_new_tokens([(tool, successor)])
                return reuse_probability(cached_tokens, [(1.0 - P_TERM, new)])
        goes_on = 1.0 - 1.0 / max(2.0, self.steps_left(done))
        new = self._expected_new_tokens((tool, after) for after in seen or ())
        return reuse_probability(cached_tokens, [(goes_on, new)])

    def _expected_new_tokens(self, edges: Iterable[tuple[str, str]]) -> float:
        """Mean over the edges given, else over all."""
        known = [self._new_tokens[edge] for edge in edges if edge in self._new_tokens]
        known = known or list(self._new_tokens.values())
        return sum(total for total, _ in known) / max(sum(count for _, count in known), 1.0)


class Histories:
    """What is known of every type of agent, and the runs under way."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._types: dict[str, AgentType] = defaultdict(AgentType)

    def begin(self, session: trace.Session, agent: str | None) -> Run:
        """An agent starts. Its type: system prompt and tools, or the product until 30 are known."""
        role = "main" if agent is None else "sub"
        group = session.shared_prefix.group if session.shared_prefix else ""
        return Run((f"{role}/{session.source}/{group}", f"{role}/{session.source}"))

    def knowledge(self, run: Run) -> AgentType | None:
        """Of the narrowest type known well enough; None: too little has been seen."""
        for name in run.types:
            if self._types[name].active:
                return self._types[name]
        return None

    def end_step(self, run: Run, call: trace.Call, issued_s: float, finished_s: float) -> None:
        """A call of the run has ended."""
        tool = tool_of(call)
        if run.tool is not None:
            gap_s = max(issued_s - run.ended_s, 0.0)
            run.gaps_s += gap_s
            for name in run.types:
                self._types[name].observe_step(run.tool, tool, call.new_tokens)
                self._types[name].observe_latency(run.tool, gap_s)
        run.steps += 1
        run.work_s += call_alone_s(
            self._hardware, call.new_tokens, call.reusable_tokens, call.output_tokens
        )
        run.tool, run.ended_s = tool, finished_s

    def end(self, run: Run) -> None:
        """The agent is done."""
        for name in run.types:
            self._types[name].observe_end(run)

    def learn(self, session: trace.Session) -> None:
        """Take in a session of the past as if it had just run without waiting."""
        runs: dict[str | None, Run] = {}
        for call, (start, end) in zip(session.calls, session.timeline, strict=True):
            run = runs.get(call.agent)
            if run is None:
                run = runs[call.agent] = self.begin(session, call.agent)
            self.end_step(run, call, start, end)
        for run in runs.values():
            self.end(run)
