"""A session is known to saga whether or not vLLM's Request has a field for it."""

import pytest

from vllm_saga.engine.hints import read_arrival
from vllm_saga.policy.hints import no_counts
from vllm_saga.simulator import identity
from vllm_saga.simulator.driver import make_request


@pytest.mark.parametrize("has_session", [identity._HAS_SESSION, False])
def test_the_session_arrives(monkeypatch, has_session):
    monkeypatch.setattr(identity, "_HAS_SESSION", has_session)
    request = make_request("r", [1, 2], 4, session_id="s", saga_parent="p")
    arrival = read_arrival(request, False, no_counts())
    assert (arrival.session_id, arrival.parent_id) == ("s", "p")
    assert (getattr(request, "session_id", None) is None) is not has_session


def test_no_session_is_named():
    assert identity.name_session(None, {}) == ({}, None)
    assert identity.name_session(None, {"a": 1}) == ({}, {"a": 1})
