"""Fuzzers of what goes between router and engines: messages, reports, metrics."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from fuzz_registry import fuzzes
from fuzz_shapes import changed, encoded, shallow, texts, values
from hypothesis import strategies as st

from vllm_saga.client import Reply
from vllm_saga.config import SagaConfig
from vllm_saga.engine import control
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.router.fleet import Arrival, EngineReport
from vllm_saga.router.guard import GuardedPlacer
from vllm_saga.router.placement import PLACERS, make_placer
from vllm_saga.router.reports import ReportError, parse_metrics, parse_state

PAYLOADS = (
    {"tenant": "t", "session": "s"},
    {"tenant": None, "state": "held", "limit": 10},
    {"name": "s", "tenant": "t"},
    {"tenant": None, "within_s": 5.0, "limit": 10},
)
OPS = (control.STATE, control.END, control.WORKFLOWS, control.WORKFLOW, control.PAST, "")
plain = st.dictionaries(texts, shallow, max_size=4)


@fuzzes("messages-to-engines", st.tuples(st.sampled_from(OPS), changed(st.sampled_from(PAYLOADS))))
def check_messages(given: Any) -> None:
    op, payload = given
    if not isinstance(payload, dict):
        return
    saga = SagaPolicy(SagaConfig.model_validate({}), 20, 16)
    try:
        if op == control.END:
            tenant, session = control.read_end(op, payload)
            assert isinstance(tenant, str) and isinstance(session, str)
        else:
            msgspec.msgpack.encode(control.explain(saga, op, payload, 0.0, set(), 0))
    except ValueError:
        return


STATE = {
    "started": "a", "kv_tokens": 1000, "used_tokens": 10, "running": 1, "waiting": 1, "resident": 1,
    "prefill_tokens_per_s": 100.0, "saga": {}, "sessions": [["t", "s"]],
    "held_calls": [{"tenant": "t", "session": "s", "new": True, "held_s": 1.0, "tokens": 10}],
}  # fmt: skip
states = encoded(changed(st.just(STATE), 4) | values) | st.binary(max_size=60)
steps = st.tuples(
    st.sampled_from(["place", "report", "end", "finish", "epoch", "drain", "down"]),
    st.integers(0, 3), states, st.none() | st.integers(0, 10**6),
)  # fmt: skip


@fuzzes("reports", st.tuples(st.sampled_from(sorted(PLACERS)), st.lists(steps, max_size=12)))
def check_reports(given: Any) -> None:
    """What an engine reports is refused, or placement can work with it: its guard sees nothing."""
    policy, events = given
    placer = GuardedPlacer(make_placer(policy), lambda replica: 0)
    for name in "ab":
        placer.add(name)
    for number, (what, which, data, tokens) in enumerate(events):
        now, session = float(number), ("t", f"s{which}")
        if what == "place":
            decision = placer.place(Arrival(f"c{number}", session, tokens or 0), now)
            assert decision is None or decision.replica in "ab"
        elif what == "report":
            try:
                placer.on_report("ab"[which % 2], parse_state(data, now))
            except ReportError:
                continue
        elif what == "finish":
            placer.on_finish(f"c{which}", now, tokens)
        elif what == "end":
            placer.end(session)
        elif what == "epoch":
            placer.epoch(now)
        elif what == "drain":
            placer.set_draining("a", bool(which % 2))
        else:
            placer.set_accepting("b", bool(which % 2))
    assert placer.errors == 0


@fuzzes("replies", encoded(changed(st.just(STATE)) | values) | st.binary(max_size=60))
def check_replies(data: bytes) -> None:
    """What `vllm-saga top` and `doctor` are answered."""
    reply = Reply(500, data)
    assert isinstance(reply.values(), dict) and isinstance(reply.error, str)
    assert isinstance(reply.text, str)


NUMBERS = ("1", "0.5", "1e999", "-1", "1e5", "9" * 400, "", "+", "nan")
NAMES = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info", "process_start_time_seconds", "other",
)  # fmt: skip
LABELS = ("", '{engine="0"}', '{engine="1",x="\\""}', '{num_gpu_blocks="9",block_size="16"}', "{")
samples = st.builds(
    "{}{} {}".format, st.sampled_from(NAMES), st.sampled_from(LABELS), st.sampled_from(NUMBERS)
)
metrics = st.lists(samples | texts, max_size=12).map("\n".join)


@fuzzes("metrics", st.tuples(metrics, st.none() | st.integers(0, 2)))
def check_metrics(given: Any) -> None:
    text, rank = given
    try:
        report = parse_metrics(text, rank, 0.0)
    except ReportError:
        return
    assert isinstance(report, EngineReport)
    assert math.isfinite(report.kv_tokens) and math.isfinite(report.used_tokens)
