"""Agent classes as a document, and back."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.policy import memory
from vllm_saga.policy.graph import AgentClasses
from vllm_saga.policy.memory import GraphError, decode, encode, from_dict, snapshot, to_dict
from vllm_saga.policy.toolgraph import START, node_name

events = st.lists(
    st.tuples(
        st.sampled_from([b"a", b"\xffb", 7, None]),
        st.sampled_from(["", "tenant"]),
        st.lists(st.text(max_size=8), max_size=3),
        st.floats(0.0, 5000.0),
        st.integers(0, 100_000),
    ),
    max_size=40,
)


def taught(seen) -> AgentClasses:
    classes = AgentClasses()
    for first, tenant, tools, gap_s, growth in seen:
        agent, node = classes.get((tenant, first)), node_name(tools)
        agent.observe_call(START, node, growth)
        agent.gaps_after(node).observe_return(gap_s)
        agent.observe_cycle(gap_s)
        agent.observe_end_after(node, 1 + growth % 50)
    return classes


SOME = [(b"a", "", ["bash"], 2.0, 300), (7, "t", ["read", "grep"], 0.1, 50)] * 20


@settings(max_examples=50)
@given(events)
def test_the_round_trip_is_exact(seen):
    classes = taught(seen)
    document = snapshot(classes)
    data = encode(document)
    assert decode(data) == document
    again = from_dict(json.loads(data))
    assert snapshot(again) == document
    assert encode(snapshot(again)) == data
    assert to_dict(again) == json.loads(data)


def test_a_new_run_knows_what_the_old_one_learned():
    old = taught(SOME)
    new = from_dict(to_dict(old))
    before, after = old.get(("", b"a")), new.get(("", b"a"))
    assert after.next_tools(START) == before.next_tools(START)
    assert after.gaps_after("bash").quantile_s(0.5) == before.gaps_after("bash").quantile_s(0.5)
    assert after.remaining_growth(2) == before.remaining_growth(2)
    # Where block hashes differ from run to run no class is found again: all of them still teach.
    unknown = new.get(("", b"another"))
    assert unknown.gaps.quantile_s(0.5) == old.get(("", b"other")).gaps.quantile_s(0.5)
    assert unknown.remaining_calls(0) != AgentClasses().get(("", b"x")).remaining_calls(0)


def test_a_snapshot_does_not_change():
    classes = taught(SOME)
    document = snapshot(classes)
    data = encode(document)
    for _ in range(50):
        classes.get(("", b"a")).observe_call("bash", "bash", 9)
        classes.get(("", b"a")).gaps_after("bash").observe_return(1.0)
    assert encode(document) == data


def test_only_the_classes_used_last_are_kept():
    classes = AgentClasses()
    for index in range(memory.MAX_CLASSES + 40):
        classes.get(("", index))
    kept = [known.key for known in snapshot(classes).agents]
    assert len(kept) == memory.MAX_CLASSES
    assert kept[-1] == f"/{memory.MAX_CLASSES + 39}"


def broken(change) -> bytes:
    data = to_dict(taught(SOME))
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "not JSON"),
        (b"\xff\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "damaged"),
        (b"{}", "format"),
        (broken(lambda d: d.update(version=99)), "version 99"),
        (broken(lambda d: d.update(everyone={})), "damaged"),
        (broken(lambda d: d["everyone"]["gaps_s"]["returns"].pop()), "damaged"),
        (broken(lambda d: d["everyone"]["gaps_s"].update(returns=[0.0] * 41)), "everyone"),
        (broken(lambda d: d["agents"][0]["agent"]["gaps_s"].update(ends=-1)), "ends"),
        (broken(lambda d: d["agents"][0]["agent"]["gaps_s"].update(ends=1e300)), "ends"),
        (broken(lambda d: d["agents"][0]["agent"]["tools"][0].update(tool="x" * 999)), "tool"),
        (broken(lambda d: d.update(agents=d["agents"] * 500)), "agents"),
    ],
)
def test_what_is_wrong_is_said(data, words):
    with pytest.raises(GraphError, match=words):
        decode(data)


def test_numbers_that_are_none_are_refused():
    data = to_dict(taught(SOME))
    data["everyone"]["gaps_s"]["ends"] = math.nan
    with pytest.raises(GraphError):
        from_dict(data)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data):
    with pytest.raises(GraphError):
        decode(data)
