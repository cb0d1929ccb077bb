"""Hints: what is taken, what is passed over, and that neither can do harm."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_saga.policy.hints import (
    DEFAULT_LIMITS,
    NOTHING,
    Declared,
    Hint,
    HintLimits,
    no_counts,
    read_flag,
    read_hint,
    read_text,
)

OUTCOMES = frozenset(no_counts())


def read(sent, limits=DEFAULT_LIMITS):
    """What is read of `sent`, and the outcomes that are not 0."""
    counts = no_counts()
    declared = read_hint(sent, limits, counts)
    assert frozenset(counts) == OUTCOMES
    return declared, {outcome: count for outcome, count in counts.items() if count}


def test_the_whole_shape_as_an_object_and_as_its_json_text():
    sent = {
        "session_id": "worker-7",
        "parent_session_id": "orchestrator-1",
        "cache_control": {"type": "ephemeral", "ttl": 120},
        "next_tool": "Bash",
        "expected_gap_s": 2.5,
        "steps_left": 4,
        "deadline_s": 900,
        "slo_factor": 3,
        "last": True,
    }
    hint = Hint("Bash", 2.5, 4, 900.0, 3.0, 120.0, True)
    expected = Declared(hint, "worker-7", "orchestrator-1"), {"accepted": 1}
    assert read(sent) == expected
    assert read(json.dumps(sent)) == expected


@pytest.mark.parametrize(
    "ttl, seconds",
    [
        (300, 300.0),
        (0, 0.0),
        ("90", 90.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        (None, 300.0),
    ],
)
def test_a_ttl_is_seconds_or_text_with_its_unit(ttl, seconds):
    declared, outcomes = read({"cache_control": {"type": "ephemeral", "ttl": ttl}})
    assert declared.hint == Hint(ttl_s=seconds)
    assert outcomes == {"accepted": 1}


def test_a_cache_control_without_a_ttl_has_upstream_s_default_within_the_limit():
    assert read({"cache_control": {}})[0].hint.ttl_s == 300.0
    assert read({"cache_control": {}}, HintLimits(max_ttl_s=60.0))[0].hint.ttl_s == 60.0


def test_milliseconds_are_seconds_and_give_way_to_our_own_field():
    assert read({"expected_tool_duration_ms": 1500})[0].hint.gap_s == 1.5
    both = {"expected_tool_duration_ms": 1500, "expected_gap_s": 9}
    assert read(both)[0].hint.gap_s == 9.0
    bad = {"expected_tool_duration_ms": 1500, "expected_gap_s": "soon"}
    assert read(bad) == (Declared(Hint(gap_s=1.5)), {"accepted": 1, "wrong_type": 1})


@pytest.mark.parametrize(
    "sent, name",
    [
        ("Bash", "Bash"),
        (["Read", "Bash", "Read"], "Bash+Read"),
        ("Read+Bash", "Bash+Read"),
        ([" Read "], "Read"),
        (["a+c", "b"], "a+b+c"),
    ],
)
def test_parallel_tools_have_one_name(sent, name):
    assert read({"next_tool": sent})[0].hint == Hint(next_tool=name)


@pytest.mark.parametrize(
    "field, value, limit",
    [
        ("ttl_s", {"cache_control": {"ttl": "9h"}}, 3600.0),
        ("ttl_s", {"cache_control": {"ttl": 10**400}}, 3600.0),
        ("gap_s", {"expected_gap_s": 1e300}, 3600.0),
        ("gap_s", {"expected_tool_duration_ms": 10**400}, 3600.0),
        ("steps_left", {"steps_left": 10**12}, 10_000),
        ("deadline_s", {"deadline_s": 1e9}, 86_400.0),
        ("deadline_s", {"deadline_s": 0}, 1.0),
        ("slo_factor", {"slo_factor": 0.01}, 1.0),
        ("slo_factor", {"slo_factor": 1e9}, 100.0),
    ],
)
def test_the_operator_s_limits_hold_and_are_counted(field, value, limit):
    declared, outcomes = read(value)
    assert declared.hint == Hint(**{field: limit})
    assert outcomes == {"accepted": 1, "clamped": 1}


@pytest.mark.parametrize(
    "sent, outcome",
    [
        ({"expected_gap_s": "3"}, "wrong_type"),
        ({"expected_gap_s": True}, "wrong_type"),
        ({"expected_gap_s": math.nan}, "not_finite"),
        ('{"expected_gap_s": NaN}', "not_finite"),
        ('{"deadline_s": 1e999}', "not_finite"),
        ({"cache_control": {"ttl": math.inf}}, "not_finite"),
        ({"steps_left": -1}, "negative"),
        ({"expected_tool_duration_ms": -0.5}, "negative"),
        ({"cache_control": {"ttl": -(10**400)}}, "negative"),
        ({"steps_left": 2.5}, "bad_value"),
        ({"cache_control": {"ttl": "-5m"}}, "bad_value"),
        ({"cache_control": {"ttl": "9" * 5000}}, "bad_value"),
        ({"cache_control": {"ttl": "5 parsecs"}}, "bad_value"),
        ({"cache_control": {"type": "persistent", "ttl": 5}}, "bad_value"),
        ({"cache_control": "ephemeral"}, "wrong_type"),
        ({"cache_control": dict.fromkeys(range(100))}, "too_long"),
        ({"last": "maybe"}, "bad_value"),
        ({"last": 2}, "bad_value"),
        ({"last": []}, "wrong_type"),
        ({"next_tool": 7}, "wrong_type"),
        ({"next_tool": ["Bash", None]}, "wrong_type"),
        ({"next_tool": []}, "bad_value"),
        ({"next_tool": "Bash+"}, "bad_value"),
        ({"next_tool": "Ba\nsh"}, "bad_value"),
        ('{"next_tool": "\\ud800"}', "bad_value"),
        ({"next_tool": "x" * 1000}, "too_long"),
        ({"next_tool": ["x"] * 1000}, "too_long"),
        ({"session_id": ["a"]}, "wrong_type"),
        ({"session_id": 10**5000}, "too_long"),
        ({"a client's own words": 1}, "unknown_key"),
        ({7: 1}, "unknown_key"),
        ({"context_management": {"edits": []}}, "unsupported"),
        (dict.fromkeys(range(100), 1), "too_long"),
        ('{"last": "' + "x" * 5000 + '"}', "too_long"),
        ("[" * 4000, "too_deep"),
        ('{"a":' * 600 + "1" + "}" * 600, "too_deep"),
        ("{'last': true}", "bad_json"),
        ("\ud800", "bad_json"),
        ("", "bad_json"),
        ("[1]", "wrong_type"),
        ("null", "wrong_type"),
        (7, "wrong_type"),
        ([], "wrong_type"),
    ],
)
def test_what_cannot_be_used_is_passed_over_and_counted(sent, outcome):
    assert read(sent) == (NOTHING, {outcome: 1})


@pytest.mark.parametrize("key", ["priority", "strict_priority"])
def test_a_priority_is_never_taken_because_its_sign_is_not_known(key):
    declared, outcomes = read({key: 5, "last": 1})
    assert declared == Declared(Hint(last=True))
    assert outcomes == {"accepted": 1, "priority": 1}


def test_what_is_good_is_taken_beside_what_is_not():
    sent = {
        "steps_left": 3,
        "deadline_s": "tomorrow",
        "cache_control": {"ttl": 9, "block_offset": 4},
    }
    declared, outcomes = read(sent)
    assert declared.hint == Hint(steps_left=3, ttl_s=9.0)
    assert outcomes == {"accepted": 1, "wrong_type": 1, "unsupported": 1}


def test_null_and_empty_are_absent_and_not_worth_counting():
    names = "session_id next_tool expected_gap_s steps_left last cache_control context_management"
    assert read(dict.fromkeys(names.split())) == (NOTHING, {})
    assert read({"session_id": "", "next_tool": "", "last": ""}) == (NOTHING, {})


def test_no_steps_left_is_an_estimate_but_not_a_last_call():
    assert read({"steps_left": 0})[0].hint == Hint(steps_left=0, last=False)


def test_an_operator_who_takes_no_hints_takes_none():
    assert read('{"session_id": "s", "last": 1}', HintLimits(enabled=False)) == (
        NOTHING,
        {"off": 1},
    )


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", " TRUE ", "yes"])
def test_yes_in_every_form_that_vllm_lets_through(value):
    counts = no_counts()
    assert read_flag(value, counts) is True
    assert not any(counts.values())


def test_a_number_is_an_id_but_a_truth_is_none():
    counts = no_counts()
    assert read_text(7, counts) == "7"
    assert not any(counts.values())
    assert read_text(True, counts) is None
    assert counts["wrong_type"] == 1


# -- whatever is sent ---------------------------------------------------------------------------

KEYS = [
    *("session_id", "parent_session_id", "cache_control", "type", "ttl", "next_tool", "last"),
    *("expected_gap_s", "expected_tool_duration_ms", "steps_left", "deadline_s", "slo_factor"),
    *("priority", "context_management"),
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["5m", "1h", "true", "ephemeral", "Bash+Read", "9" * 20 + "h"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=5)
        | st.dictionaries(st.integers() | st.booleans() | st.none(), inner, max_size=3)
    ),
    max_leaves=12,
)
objects = st.dictionaries(st.sampled_from(KEYS), values | scalars, max_size=14)
some_limits = st.builds(
    HintLimits,
    max_chars=st.integers(0, 5000),
    max_ttl_s=st.floats(0.0, 1e6),
    max_gap_s=st.floats(0.0, 1e6),
    max_steps=st.integers(0, 10**6),
    min_deadline_s=st.floats(0.0, 10.0),
    max_deadline_s=st.floats(10.0, 1e6),
    min_slo_factor=st.floats(0.0, 10.0),
    max_slo_factor=st.floats(10.0, 1e6),
)


def check_within(declared, limits):
    for name in (declared.session_id, declared.parent_id):
        assert name is None or (isinstance(name, str) and name)
    hint = declared.hint
    if hint is None:
        return
    assert hint != Hint()
    assert type(hint.last) is bool
    assert hint.ttl_s is None or 0.0 <= hint.ttl_s <= limits.max_ttl_s
    assert hint.gap_s is None or 0.0 <= hint.gap_s <= limits.max_gap_s
    assert hint.steps_left is None or type(hint.steps_left) is int
    assert hint.steps_left is None or 0 <= hint.steps_left <= limits.max_steps
    least, most = limits.min_deadline_s, limits.max_deadline_s
    assert hint.deadline_s is None or least <= hint.deadline_s <= most
    least, most = limits.min_slo_factor, limits.max_slo_factor
    assert hint.slo_factor is None or least <= hint.slo_factor <= most
    if hint.next_tool is not None:
        tools = hint.next_tool.split("+")
        assert tools == sorted(set(tools)) and all(tools) and len(hint.next_tool) < 16 * 130
        assert hint.next_tool.isprintable()


@settings(max_examples=400)
@given(values | objects, some_limits)
def test_any_object_is_read_without_an_error_and_within_the_limits(sent, limits):
    declared, outcomes = read(sent, limits)
    check_within(declared, limits)
    assert outcomes.get("accepted", 0) == (declared != NOTHING)


@settings(max_examples=400)
@given(st.text(max_size=300) | objects.map(json.dumps), some_limits)
@example("[" * 100_000, HintLimits(max_chars=10**6))
@example('{"a":[' * 32 + "1", DEFAULT_LIMITS)
@example('{"session_id":' + "9" * 5000 + "}", HintLimits(max_chars=10**6))
def test_any_text_is_read_without_an_error_and_within_the_limits(text, limits):
    declared, outcomes = read(text, limits)
    check_within(declared, limits)
    assert outcomes.get("accepted", 0) == (declared != NOTHING)


@given(objects)
def test_text_and_object_say_the_same(sent):
    text = json.dumps(sent)
    by_text, by_object = read(text, HintLimits(max_chars=10**6)), read(json.loads(text))
    if not by_text[1].keys() & {"too_deep", "bad_json"}:
        assert by_text == by_object
