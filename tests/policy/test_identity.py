"""Whose call is it: ids, parents, lineage."""

from __future__ import annotations

from helpers import BLOCK, arrival, make_policy, run_call

from vllm_saga.policy.identity import session_key

SYSTEM = list(range(100, 140))


def workflow_of(policy, call_id):
    return policy.calls[call_id].context.session.workflow


def test_calls_with_one_id_are_one_workflow_and_ids_mean_nothing_across_tenants():
    policy = make_policy()
    for call_id, tenant in (("a", "x"), ("b", "x"), ("c", "y")):
        policy.on_arrival(arrival(call_id, SYSTEM, "s", tenant=tenant), 0.0)
    assert workflow_of(policy, "a") is workflow_of(policy, "b")
    assert workflow_of(policy, "a") is not workflow_of(policy, "c")


def test_a_parent_link_folds_into_the_root_even_before_the_root_has_spoken():
    policy = make_policy(pool_blocks=1000)
    policy.on_arrival(arrival("grandchild", SYSTEM, "g", parent_id="c"), 0.0)
    policy.on_arrival(arrival("child", SYSTEM, "c", parent_id="r"), 0.0)
    policy.on_arrival(arrival("late", SYSTEM, "l", parent_id="g"), 0.0)
    assert workflow_of(policy, "late") is workflow_of(policy, "grandchild")
    assert workflow_of(policy, "child") is workflow_of(policy, "grandchild")


def test_a_session_that_names_itself_as_parent_is_a_root():
    policy = make_policy()
    policy.on_arrival(arrival("a", SYSTEM, "s", parent_id="s"), 0.0)
    assert workflow_of(policy, "a").known


def test_a_prompt_that_continues_a_context_belongs_to_its_session():
    policy = make_policy(pool_blocks=1000)
    context = run_call(policy, arrival("a", [*SYSTEM, 1, 2, 3], None), [9] * 7, 0.0)
    policy.on_arrival(arrival("b", [*context, 5, 6], None), 1.0)
    assert workflow_of(policy, "b").known
    assert len(policy.table.sessions) == 1


def test_a_rerendered_assistant_turn_is_still_the_same_session():
    policy = make_policy(pool_blocks=1000)
    prompt = [*SYSTEM, *range(20)]
    run_call(policy, arrival("a", prompt, None), [9] * 20, 0.0)
    policy.on_arrival(arrival("b", [*prompt, 8, 8, 8, 8, 8, 8], None), 1.0)
    assert len(policy.table.sessions) == 1


def test_agents_that_share_a_system_prompt_do_not_collapse_into_one():
    policy = make_policy(pool_blocks=1000)
    for index in range(10):
        # The own part is shorter than a block: the last full block is the shared one.
        own = [index] * (BLOCK - 1)
        run_call(policy, arrival(f"c{index}", [*SYSTEM, *own], None), [50 + index] * 9, 0.0)
    longer = [*SYSTEM, *[77] * (BLOCK + 2)]
    policy.on_arrival(arrival("new", longer, None), 1.0)
    assert len(policy.table.sessions) == 11


def test_the_same_prompt_again_is_a_retry_not_a_continuation():
    policy = make_policy(pool_blocks=1000)
    for call_id in ("a", "b"):
        run_call(policy, arrival(call_id, SYSTEM, None), [3] * 8, 0.0)
    assert len(policy.table.sessions) == 2


def test_a_retry_of_a_call_that_was_aborted_while_held_stays_in_its_session():
    policy = make_policy(pool_blocks=40, patience=0.0)
    context = run_call(policy, arrival("a", SYSTEM, None), [9] * 8, 0.0)
    context = run_call(policy, arrival("b", [*context, 5], None), [9] * 8, 0.0)
    policy.on_arrival(arrival("big", [7] * 36 * BLOCK, "big"), 0.0)
    policy.residency.leave(policy.table.sessions["", "\0a"].workflow)
    prompt = [*context, 6, 6, 6, 6, 6]
    policy.on_arrival(arrival("c", prompt, None), 0.1)
    assert policy.is_held("c")
    policy.on_finish("c", len(prompt), 0.2)
    policy.on_arrival(arrival("d", prompt, None), 0.3)
    assert workflow_of(policy, "d") is policy.table.sessions["", "\0a"].workflow


def test_lineage_can_be_turned_off():
    policy = make_policy(pool_blocks=1000, lineage=False)
    context = run_call(policy, arrival("a", SYSTEM, None), [9] * 8, 0.0)
    policy.on_arrival(arrival("b", [*context, 5], None), 1.0)
    assert len(policy.table.sessions) == 2
    assert len(policy.lineage) == 0


def test_a_class_whose_calls_are_continued_is_known_from_its_first_call():
    policy = make_policy(pool_blocks=10_000)
    for index in range(10):
        context = run_call(policy, arrival(f"a{index}", [*SYSTEM, *[index] * 8]), [1] * 8, 0.0)
        run_call(policy, arrival(f"b{index}", [*context, 5, 5, 5, 5]), [1] * 8, 1.0)
    policy.on_arrival(arrival("first", [*SYSTEM, *[99] * 8]), 2.0)
    assert workflow_of(policy, "first").known


def test_a_megabyte_of_session_id_is_kept_as_a_digest():
    key = session_key("t", "x" * 1_000_000)
    assert len(key[1]) < 100
    assert key != session_key("t", "x" * 1_000_001)
    assert session_key("t", "\udc80" * 300)[1].startswith("blake2b:")
