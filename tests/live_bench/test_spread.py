"""Co-location and calls per replica, on records made by hand."""

import pytest

from benchmarks.live import spread
from benchmarks.live.replay import CallRecord, SessionRecord


def session(*replicas: str | None, decision: str | None = None) -> SessionRecord:
    """Calls sent one second after another to these replicas, noted in another order."""
    calls = [
        CallRecord("s", k, float(k), k + 0.1, k + 0.5, 100, 0, 0, 5, 1.0, replica, decision)
        for k, replica in enumerate(replicas)
    ]
    return SessionRecord("s", 0.0, 9.0, calls=calls[::-1])


def test_a_call_is_co_located_with_the_one_sent_before_it() -> None:
    found = spread.summarise([session("a", "a", "b", "b"), session("b", "b"), session("a")], 2)
    assert found["colocation"] == pytest.approx(3 / 4)
    assert found["replica_calls"] == {"a": 3, "b": 4}
    assert found["busiest_share"] == pytest.approx(4 / 7)


def test_what_no_server_says_is_unknown_and_not_guessed() -> None:
    found = spread.summarise([session(None, None, None)], 2)
    assert found["colocation"] is None and found["busiest_share"] is None
    assert found["replica_calls"] == {} and found["decisions"] == {}
    partly = spread.summarise([session("a", None, "a", "a")], 2)
    assert partly["colocation"] == 1.0


def test_decisions_are_counted() -> None:
    sessions = [session("a", "a", decision="home"), session("b", decision="new"), session("b")]
    assert spread.summarise(sessions, 2)["decisions"] == {"home": 2, "new": 1}
