"""The built-in workloads: valid, seeded, and shaped like the figures they are drawn from."""

import hashlib
import itertools
import statistics
from collections import defaultdict
from functools import cache

import msgspec
import pytest

from vllm_saga.simulator import builtin, trace
from vllm_saga.simulator.builtin import claude_code, tenants
from vllm_saga.simulator.trace import Call, Session

COUNTS = {"swe": 150, "web": 400, "claude-code": 250, "service": 400, "tenants": 150}


@cache
def sample(name: str) -> list[Session]:
    return builtin.generate(name, COUNTS[name], seed=11)


def main_calls(name: str) -> list[list[Call]]:
    return [[call for call in one.calls if call.agent is None] for one in sample(name)]


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


@pytest.mark.parametrize("name", builtin.NAMES)
def test_sessions_are_valid_and_seeded(name: str) -> None:
    sessions = sample(name)
    assert sessions[:7] == builtin.generate(name, 7, seed=11)
    assert sessions[:7] != builtin.generate(name, 7, seed=12)
    assert len({one.session_id for one in sessions}) == len(sessions)
    for one in sessions:
        trace.check(one, one.session_id)
        assert one.calls[-1].gap == "end"
        assert one.shared_prefix is not None and one.shared_prefix.tokens is not None
        assert one.shared_prefix.tokens <= one.calls[0].prompt_tokens
        assert one.calls[0].new_tokens == one.calls[0].prompt_tokens


@pytest.mark.parametrize("name", builtin.NAMES)
def test_a_call_extends_only_what_is_there(name: str) -> None:
    """The parent has ended before the call starts, and left at least what the call reuses."""
    for one in sample(name):
        ended: list[set[int]] = []
        for index, call in enumerate(one.calls):
            ended.append({*one.deps[index], *(e for dep in one.deps[index] for e in ended[dep])})
            parent = one.parents[index]
            if parent is None:
                continue
            assert parent in ended[index]
            before = one.calls[parent]
            if call.kind is None:
                assert call.reusable_tokens == before.context_tokens
            elif call.kind == "branch":
                assert 0 < call.reusable_tokens < before.context_tokens
            else:
                assert call.reusable_tokens == 0


def test_the_default_workload_never_changes() -> None:
    """`benchmarks/live` publishes figures measured on it."""
    assert builtin.generate("swe", 5, 7) == builtin.sessions(5, 7)
    digest = hashlib.sha256(msgspec.json.encode(builtin.sessions(5, 7))).hexdigest()
    assert digest == "bddabc352c969e259e28eb9bd17c435f34da43e6723e1f8df69c10353bee6880"


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(trace.TraceError, match=r"'swee' is not .* swe, web, claude-code"):
        builtin.generate("swee", 1)


@pytest.mark.parametrize(
    ("name", "measure", "share", "published", "tolerance"),
    [
        # SAGA's figures for SWE-bench; TraceLab's share of gaps under 10 s.
        ("swe", "turns", 0.5, 37, 0.2),
        ("swe", "output", 0.5, 300, 0.1),
        ("swe", "tool", 0.88, 10.0, 0.3),
        # Browser agents on WebVoyager.
        ("web", "turns", 0.5, 8, 0.15),
        ("web", "turns", 0.9, 20, 0.1),
        ("web", "prompt", 0.5, 5_000, 0.15),
        ("web", "prompt", 0.9, 8_000, 0.15),
        ("web", "new", 0.5, 2_262, 0.1),
        ("web", "new", 0.9, 4_302, 0.1),
        ("web", "output", 0.5, 146, 0.1),
        ("web", "output", 0.9, 328, 0.1),
        ("web", "tool", 0.5, 3.4, 0.1),
        ("web", "tool", 0.9, 12.5, 0.1),
        ("web", "tool", 0.99, 41, 0.2),
        # Recorded Claude Code sessions; humans as in TraceLab.
        ("claude-code", "turns", 0.5, 48, 0.25),
        ("claude-code", "turns", 0.9, 144, 0.25),
        ("claude-code", "prompt", 0.5, 97_600, 0.25),
        ("claude-code", "prompt", 0.9, 205_600, 0.25),
        ("claude-code", "new", 0.5, 342, 0.2),
        ("claude-code", "new", 0.9, 4_023, 0.3),
        ("claude-code", "new", 0.99, 57_597, 0.3),
        ("claude-code", "output", 0.5, 218, 0.1),
        ("claude-code", "output", 0.9, 920, 0.1),
        ("claude-code", "tool", 0.88, 10.0, 0.4),
        ("claude-code", "human", 0.5, 86, 0.15),
        ("claude-code", "human", 0.9, 1_260, 0.25),
        # tau2-bench, airline and retail.
        ("service", "turns", 0.5, 11, 0.1),
        ("service", "turns", 0.9, 17, 0.15),
        ("service", "prompt", 0.5, 4_600, 0.1),
        ("service", "prompt", 0.9, 7_200, 0.1),
        ("service", "new", 0.5, 60, 0.15),
        ("service", "new", 0.9, 528, 0.15),
        ("service", "new", 0.99, 1_701, 0.15),
        ("service", "output", 0.5, 52, 0.1),
        ("service", "output", 0.9, 155, 0.1),
        ("service", "human", 0.5, 86, 0.15),
    ],
)
def test_quantiles_are_near_the_published_ones(
    name: str, measure: str, share: float, published: float, tolerance: float
) -> None:
    """New tokens leave out first calls, as the published figures do; main agents only."""
    values: dict[str, list[float]] = defaultdict(list)
    for calls in main_calls(name):
        values["turns"].append(len(calls))
        values["new"] += [call.new_tokens for call in calls[1:]]
        for call in calls:
            values["prompt"].append(call.prompt_tokens)
            values["output"].append(call.output_tokens)
            if call.tool_latency_s is not None:
                values[call.gap or "none"].append(call.tool_latency_s)
    assert quantile(values[measure], share) == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "within_session", "with_prefix"),
    [("web", 0.505, 0.531), ("claude-code", 0.965, 0.967), ("service", 0.899, 0.958)],
)
def test_reuse_is_near_the_published_share(
    name: str, within_session: float, with_prefix: float
) -> None:
    sessions = sample(name)
    prompt = sum(call.prompt_tokens for one in sessions for call in one.calls)
    new = sum(call.new_tokens for one in sessions for call in one.calls)
    shared = sum(one.shared_prefix.tokens or 0 for one in sessions if one.shared_prefix)
    assert 1 - new / prompt == pytest.approx(within_session, abs=0.03)
    assert 1 - (new - shared) / prompt == pytest.approx(with_prefix, abs=0.03)


def test_web_edits_its_context_at_every_step() -> None:
    for calls in main_calls("web"):
        assert calls[0].kind is None
        assert all(call.kind == "branch" for call in calls[1:])


def test_claude_code_has_humans_edits_and_compactions() -> None:
    calls = [call for one in main_calls("claude-code") for call in one[:-1]]
    assert sum(call.gap == "human" for call in calls) / len(calls) == pytest.approx(0.12, abs=0.02)
    edits = sum(call.kind == "branch" for call in calls) / len(calls)
    assert edits == pytest.approx(0.06, abs=0.015)
    largest = max(claude_code.WINDOWS_TOKENS)
    assert all(call.context_tokens <= largest for call in calls)
    compacted = [
        one
        for one in main_calls("claude-code")
        if any(b.prompt_tokens < a.prompt_tokens for a, b in itertools.pairwise(one))
    ]
    assert 0.02 < len(compacted) / COUNTS["claude-code"] < 0.4


def test_claude_code_sub_agents_run_side_by_side() -> None:
    with_some = [one for one in sample("claude-code") if any(call.agent for call in one.calls)]
    assert len(with_some) / COUNTS["claude-code"] == pytest.approx(0.44, abs=0.1)
    widest = 0
    for one in with_some:
        for index, call in enumerate(one.calls):
            if call.agent is not None or call.deps is None:
                continue
            spawn, *ends = call.deps
            assert one.calls[spawn].gap == "subagents"
            assert all(one.calls[end].gap == "end" and one.calls[end].agent for end in ends)
            assert one.parents[index] == spawn
            assert call.new_tokens >= sum(one.calls[end].output_tokens for end in ends)
            starts = [one.timeline[k][0] for k in range(spawn + 1, spawn + 1 + len(ends))]
            assert max(starts) - min(starts) < 1.0
            widest = max(widest, len(ends))
    assert widest == max(claude_code.BURST_SIZES)


def test_claude_code_tools_have_latencies_of_their_own() -> None:
    latencies: dict[str, list[float]] = defaultdict(list)
    for one in sample("claude-code"):
        for call in one.calls:
            if call.tool and call.tool_latency_s is not None:
                latencies[call.tool].append(call.tool_latency_s)
    assert set(latencies) == set(claude_code.TOOLS)
    assert statistics.median(latencies["Bash"]) == pytest.approx(0.85, rel=0.15)
    assert statistics.median(latencies["Read"]) == pytest.approx(0.04, rel=0.15)
    assert statistics.mean(latencies["WebFetch"]) == pytest.approx(16, rel=0.25)
    everything = [value for values in latencies.values() for value in values]
    long_ones = sum(value >= 60 for value in everything) / len(everything)
    assert long_ones == pytest.approx(0.04, abs=0.015)


def test_tenants_arrive_at_their_own_rates() -> None:
    sessions = builtin.generate("tenants", 600, seed=5)
    arrivals = [one.arrival_s or 0.0 for one in sessions]
    assert arrivals == sorted(arrivals)
    assert tenants.SESSIONS_PER_MIN == 92
    assert len(sessions) / arrivals[-1] * 60 == pytest.approx(92, rel=0.12)
    assert len({one.tenant for one in sessions}) == 10
    for kind, steps, share in (
        ("heavy", 100, 48 / 92),
        ("medium", 30, 32 / 92),
        ("light", 10, 0.13),
    ):
        mine = [one for one in sessions if (one.tenant or "").startswith(kind)]
        assert len(mine) / len(sessions) == pytest.approx(share, abs=0.05)
        assert {sum(call.agent is None for call in one.calls) for one in mine} == {steps}
        assert all(one.shared_prefix and one.shared_prefix.group == one.tenant for one in mine)
