"""The gate's judgement: it must fail on every kind of difference, and on having proved nothing."""

from run import Result, patched_problems, problems

GOOD = {"t::a": "passed", "t::b": "failed"}


def result(outcomes=GOOD, saga=0, on=0, failures=()):
    return Result(dict(outcomes), {"saga": saga, "saga on": on}, list(failures), 1.0)


def saga_result(outcomes=GOOD, saga=3, on=1, failures=()):
    return result(outcomes, saga, on, failures)


def test_equal_outcomes_pass_even_where_stock_fails():
    assert problems(result(), saga_result()) == []


def test_a_changed_outcome_is_named_with_both_sides():
    assert problems(result(), saga_result(GOOD | {"t::a": "error"})) == [
        "t::a: stock passed, saga error"
    ]


def test_a_test_that_only_one_side_ran_is_a_difference():
    assert problems(result(), saga_result({"t::a": "passed"})) == [
        "t::b: stock failed, saga not run"
    ]


def test_a_hidden_policy_failure_fails_the_gate():
    found = problems(result(), saga_result(failures=["t::a: KeyError('x')"]))
    assert found == ["policy failure in t::a: KeyError('x')"]


def test_nothing_compared_fails_the_gate():
    assert any("compared nothing" in p for p in problems(result({}), saga_result({})))


def test_a_swap_that_did_not_happen_fails_the_gate():
    assert any("swap did not happen" in p for p in problems(result(), saga_result(saga=0, on=0)))


def test_saga_never_on_fails_the_gate():
    assert any("stock with stock" in p for p in problems(result(), saga_result(saga=3, on=0)))


def patched_result(outcomes=GOOD, hooks=("on_request_finished",)):
    return Result(dict(outcomes), {"stock": 3}, [], 1.0, list(hooks))


def test_with_patches_the_same_outcomes_pass():
    assert patched_problems(result(), patched_result()) == []


def test_with_patches_a_changed_outcome_is_named():
    assert patched_problems(result(), patched_result(GOOD | {"t::a": "failed"})) == [
        "t::a: stock passed, patched failed"
    ]


def test_patches_that_were_not_there_or_everywhere_fail_the_gate():
    assert any("not what made" in p for p in patched_problems(result(), patched_result(hooks=())))
    assert any("not what made" in p for p in patched_problems(patched_result(), patched_result()))
