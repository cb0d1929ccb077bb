"""What makes a client's recognition good or bad."""

from __future__ import annotations

import pytest
from recognition import Conversation, Seen, count_failures, problems, read_sessions


def seen(calls, source="codex", backend="a"):
    return Seen(source, backend, calls)


def conversation(*turns, helpers=0, failed=()):
    """`turns`: (sessions before, sessions after)."""
    made = Conversation(helpers, failed=list(failed))
    for before, after in turns:
        made.note(before, after)
    return made


def test_a_turn_s_calls_are_what_the_router_counted_in_it():
    other = {"x": seen(3)}
    made = conversation(
        (other, {**other, "s": seen(2)}),
        ({**other, "s": seen(2)}, {**other, "s": seen(5, backend="b")}),
    )
    assert made.sessions == {"s": seen(5, backend="b")}
    assert made.backends == {"a", "b"}


def test_the_router_s_list_is_read():
    entry = {"session": "s", "source": "codex", "backend": "a", "calls": 2, "tenant": ""}
    assert read_sessions([entry]) == {"s": seen(2)}


def test_failed_calls_are_counted():
    metrics = (
        'http_requests_total{handler="/v1/messages",method="POST",status="2xx"} 9.0\n'
        'http_requests_total{handler="/v1/messages",method="POST",status="4xx"} 2.0\n'
        'http_requests_total{handler="none",method="HEAD",status="4xx"} 5.0\n'
        'saga_router_refused_total{reason="no_backend"} 1.0\n'
    )
    assert count_failures(metrics) == 3


def test_all_is_well():
    first = conversation(({}, {"s": seen(2)}))
    second = conversation(({}, {"t": seen(2), "t:u": seen(2, backend="b")}), helpers=1)
    assert not list(problems("codex", {"first": first, "second": second}))


@pytest.mark.parametrize(
    "made, problem",
    [
        (conversation(), "0 sessions"),
        (conversation(({}, {"s": seen(2), "t": seen(1)})), "2 sessions"),
        (conversation(({}, {"s": seen(2)}), helpers=1), "1 sessions"),
        (conversation(({}, {"s": seen(1)})), "1 calls"),
        (conversation(({}, {"s": seen(2, "lineage")})), "recognised by lineage"),
        (
            conversation(({}, {"s": seen(2)}), ({"s": seen(2)}, {"s": seen(3, backend="b")})),
            "on 2 backends",
        ),
        (conversation(({}, {"s": seen(2)}), failed=["ended with 1"]), "ended with 1"),
    ],
)
def test_a_problem_is_named(made, problem):
    assert any(problem in found for found in problems("codex", {"first": made}))


def test_two_conversations_taken_for_one():
    first = conversation(({}, {"s": seen(2)}))
    second = conversation(({"s": seen(2)}, {"s": seen(4)}))
    found = list(problems("codex", {"first": first, "second": second}))
    assert found == ["second: is taken for first"]
