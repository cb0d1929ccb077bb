"""What clients declare is believed where it was nearer the truth than what was learned."""

from __future__ import annotations

from helpers import arrival, make_policy
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.declared import Declared
from vllm_saga.policy.hints import Hint

seconds = st.floats(0.0, 1e6)


def test_nothing_is_believed_at_first():
    declared = Declared()
    for _ in range(7):
        declared.observe(5.0, 50.0, 5.0)
    assert not declared.believed
    declared.observe(5.0, 50.0, 5.0)
    assert declared.believed


def test_ten_times_too_long_is_not_believed():
    declared = Declared()
    for gap in (0.2, 0.5, 1.0, 3.0, 8.0) * 10:
        declared.observe(10.0 * gap, 1.0, gap)
    assert not declared.believed


@given(st.lists(st.tuples(seconds, seconds, seconds), max_size=300))
def test_who_is_no_better_is_never_believed(values):
    declared = Declared()
    for said, _, actual in values:
        declared.observe(said, said, actual)
        assert not declared.believed


def test_a_change_for_the_worse_is_noticed():
    declared = Declared()
    for _ in range(150):
        declared.observe(5.0, 9.0, 5.0)
    assert declared.believed
    for _ in range(300):
        declared.observe(500.0, 9.0, 5.0)
    assert not declared.believed


def one_session(policy, name, calls, hint_of):
    now = 0.0
    tokens = [hash(name) % 997] * 8
    for number in range(calls):
        tokens = [*tokens, number]
        policy.on_arrival(arrival(f"{name}-{number}", tokens, name, hint=hint_of(number)), now)
        policy.on_finish(f"{name}-{number}", len(tokens), now + 1.0)
        now += 3.0
    policy.on_step(now + 1e6)


def test_calls_left_count_once_they_came_true():
    policy = make_policy(pool_blocks=10_000)
    for number in range(20):
        one_session(policy, f"s{number}", 3 + number % 5 * 10, lambda k, n=number: Hint(
            steps_left=3 + n % 5 * 10 - k - 1
        ))  # fmt: skip
    policy.on_arrival(arrival("x", [1] * 8, "x", hint=Hint(steps_left=41)), 0.0)
    workflow = policy.calls["x"].context.session.workflow
    assert workflow.remaining_calls() == 42.0
    assert workflow.remaining_s() > 0 and workflow.remaining_growth_tokens() > 0
    policy.on_finish("x", 9, 1.0)
    assert workflow.remaining_calls() == 41.0


def test_a_hint_names_the_tool_where_the_output_does_not():
    policy = make_policy(pool_blocks=1000)
    policy.on_arrival(arrival("a", [1] * 8, "s", hint=Hint(next_tool="Bash+Read")), 0.0)
    workflow = policy.calls["a"].context.session.workflow
    policy.on_finish("a", 9, 1.0)
    assert workflow.tool == "Bash+Read"
    policy.on_arrival(arrival("b", [1] * 12, "s", hint=Hint(next_tool="Read")), 2.0)
    policy.on_finish("b", 13, 3.0, ["Edit"])
    assert workflow.tool == "Edit"
