"""The parts of the router that need no network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.clients import Rules
from vllm_saga.policy.identity import salt_tenant
from vllm_saga.router.backends import Address, AddressError, parse_list
from vllm_saga.router.calls import is_preamble
from vllm_saga.router.edge import Edge
from vllm_saga.router.fleet import Decision, HeldCall, Move
from vllm_saga.router.health import Health
from vllm_saga.router.journal import Journal
from vllm_saga.router.reports import ReportError, parse_metrics, parse_state
from vllm_saga.router.usage import Usage

# -- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url", "rank", "name"),
    [
        ("http://h:8000", "http://h:8000", None, "h:8000"),
        ("http://h:8000/", "http://h:8000", None, "h:8000"),
        (" https://h ", "https://h", None, "h:443"),
        ("http://h:8000#0", "http://h:8000", 0, "h:8000-dp0"),
        ("http://h:8000/a/b/#12", "http://h:8000/a/b", 12, "h:8000/a/b-dp12"),
        ("http://[::1]:8000", "http://[::1]:8000", None, "::1:8000"),
    ],
)
def test_addresses(text, url, rank, name):
    assert Address.parse(text) == Address(url, rank, name)


@pytest.mark.parametrize(
    "text",
    ["", "h:8000", "ftp://h", "http://", "http://h?x=1", "http://u@h", "http://h#-1", "http://h:x"],
)
def test_what_is_no_address(text):
    with pytest.raises(AddressError):
        Address.parse(text)


def test_lists_of_addresses():
    found = parse_list("http://a:1, http://b:2#0\n# http://c:3\n\n  http://b:2#1 ")
    assert [a.name for a in found] == ["a:1", "b:2-dp0", "b:2-dp1"]


# -- health -------------------------------------------------------------------------------------


def test_a_backend_is_down_until_it_is_found():
    health = Health(successes=2)
    assert health.state(0) == "down"
    health.probed(True)
    assert not health.accepting(0)
    health.probed(True)
    assert health.accepting(0)


def test_one_failed_probe_is_no_proof_but_a_refused_connection_is():
    health = Health(failures=3)
    health.probed(True)
    for found in (False, False, True, False, False):
        health.probed(found)
    assert health.up
    health.probed(False)
    assert not health.up
    health.probed(True)
    health.probed(False, refused=True)
    assert not health.up


def test_the_breaker_opens_longer_each_time_and_a_good_call_closes_it():
    health = Health(breaker_failures=3, breaker_s=10)
    health.probed(True)
    for _ in range(3):
        assert health.accepting(0)
        health.call_failed(0)
    assert (health.accepting(9.9), health.accepting(10)) == (False, True)
    health.call_failed(10)
    assert (health.accepting(29.9), health.accepting(30)) == (False, True)
    health.call_succeeded()
    health.call_failed(31)
    assert health.accepting(31)


def test_breaks_do_not_grow_without_end():
    health = Health(breaker_failures=1, breaker_s=10)
    health.probed(True)
    now = 0.0
    for _ in range(20):
        health.call_failed(now)
        now += 60
        assert health.accepting(now)


def test_an_engine_that_comes_back_starts_anew():
    health = Health(breaker_failures=1, breaker_s=100)
    health.probed(True)
    health.call_failed(0)
    health.probed(False, refused=True)
    health.probed(True)
    assert health.accepting(1)


# -- reports ------------------------------------------------------------------------------------

STOCK = """\
# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="a \\"b\\" c"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="1",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.125
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
process_start_time_seconds 1.7e+09
"""


def test_metrics_of_one_engine_and_of_all():
    one = parse_metrics(STOCK, 1, at=5.0)
    assert (one.running, one.waiting, one.kv_tokens, one.used_tokens) == (4, 0, 16_000, 2_000)
    assert one.at == 5.0
    every = parse_metrics(STOCK, None, at=5.0)
    assert (every.running, every.waiting, every.kv_tokens, every.used_tokens) == (
        7,
        1,
        32_000,
        10_000,
    )
    assert every.started == one.started == "1700000000.0"


@pytest.mark.parametrize("text", ["", "<html>", "other_metric 1.0", "vllm:num_requests_running 1"])
def test_metrics_of_something_else(text):
    with pytest.raises(ReportError):
        parse_metrics(text, None, 0)


@given(st.text())
def test_metrics_are_read_or_refused(text):
    try:
        parse_metrics("vllm:kv_cache_usage_perc 0.5\n" + text, None, 0)
    except ReportError as error:
        pytest.fail(str(error))


def test_the_state_of_an_engine():
    report = parse_state(
        b'{"started":"x","kv_tokens":100,"used_tokens":10,"running":1,"waiting":2,"resident":3,'
        b'"prefill_tokens_per_s":5.5,"sessions":[["t","a"]],"saga":{},"new":1,'
        b'"held_calls":[{"tenant":"","session":"s","new":true,"held_s":0.5,"tokens":7}]}',
        at=1.0,
    )
    assert report.held_calls == (HeldCall("", "s", True, 0.5, 7),)
    assert report.sessions == (("t", "a"),)
    assert (report.started, report.kv_tokens, report.prefill_tokens_per_s) == ("x", 100, 5.5)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"started": 1}', b"[" * 100_000])
def test_the_state_of_something_else(data):
    with pytest.raises(ReportError):
        parse_state(data, 0)


# -- usage --------------------------------------------------------------------------------------


def total(*pieces: bytes, prompt: int = 10) -> int | None:
    usage = Usage(prompt, readable=True)
    for piece in pieces:
        usage.feed(piece)
    return usage.total_tokens()


def test_usage_as_each_api_tells_it():
    assert total(b'{"choices":[],"usage":{"prompt_tokens":1,"total_tokens": 42}}') == 42
    assert total(b'data: {"usage":null}\n\n', b'data: {"usage":{"total_tokens":7}}\n\n') == 7
    responses = b'data: {"usage":{"input_tokens":30,"output_tokens":4,"total_tokens":34}}\n\n'
    assert total(b"data: {}\n\n" * 50, responses) == 34
    anthropic = b'data: {"usage":{"input_tokens":0,"output_tokens":4}}\n\n'
    assert total(b'data: {"usage":{"output_tokens":9}}\n\n') == 19
    assert total(anthropic, anthropic.replace(b":0", b":6")) == 10


def test_usage_is_estimated_where_it_is_not_told():
    assert total(b"data: {}\n\n" * 5, b"data: [DONE]\n\n") == 16
    assert total(b"no json") is None
    assert Usage(5, readable=False).total_tokens() is None


def test_text_that_speaks_of_usage_is_not_taken_for_it():
    quoted = rb'{"content":"\"total_tokens\": 99","usage":{"total_tokens":3}}'
    assert total(quoted) == 3
    assert total(quoted.replace(b'"usage":{"total_tokens":3}', b'"x":1')) is None


@given(st.lists(st.binary(max_size=30_000), max_size=5), st.integers(1, 10**6))
def test_usage_is_found_however_it_is_cut(pieces, tokens):
    whole = b"".join(pieces) + b'{"total_tokens": %d}' % tokens
    assert total(*[whole[i : i + 1000] for i in range(0, len(whole), 1000)]) == tokens


# -- streams ------------------------------------------------------------------------------------


def test_announcements_are_no_answer():
    created = b'event: response.created\ndata: {"a": "event: x"}\n\n'
    assert is_preamble(created)
    assert is_preamble(created + b"event: response.in_progress\ndata: {}\n\nevent: resp")
    assert not is_preamble(created + b"event: response.output_item.added\ndata: {}\n\n")
    assert not is_preamble(created + b"x" * (4 << 20))
    assert not is_preamble(b'data: {"error": "of another shape"}\n\n')
    assert not is_preamble(b": ping\n\n")


# -- the journal --------------------------------------------------------------------------------


def test_the_journal_follows_sessions():
    journal = Journal(max_sessions=10, session_idle=100)
    key = ("t", "s")
    journal.placed("c1", key, "codex", Decision("a", "new"), 0)
    journal.placed("c2", key, "codex", Decision("a", "home"), 1)
    journal.finished(key, 500, 2)
    journal.finished(key, None, 3)
    journal.moved(Move(key, "a", "b", (), "stolen"))
    (entry,) = journal.sessions(10, 4)
    assert (entry["backend"], entry["calls"], entry["moves"]) == ("b", 2, 1)
    assert (entry["total_tokens"], entry["idle_s"], entry["age_s"]) == (500, 1, 4)
    assert [d["reason"] for d in journal.decisions(9)] == ["stolen", "home", "new"]
    assert journal.ended(key)
    assert not journal.ended(key)


def test_the_journal_forgets_who_is_idle_and_who_is_too_many():
    journal = Journal(max_sessions=3, session_idle=100)
    for number in range(5):
        journal.placed(f"c{number}", ("", str(number)), "vllm", Decision("a", "new"), number)
    assert [s["session"] for s in journal.sessions(10, 5)] == ["4", "3", "2"]
    assert [s["session"] for s in journal.sessions(10, 103)] == ["4"]
    for number in range(2000):
        journal.placed(f"d{number}", None, "none", Decision("a", "new"), 200)
    assert len(journal.decisions(10_000)) == 1000


def test_a_salt_names_the_tenant_as_engines_report_it_unless_a_header_does():
    edge = Edge(Rules(), 10, 60.0)

    def key(headers, body):
        path = "/v1/chat/completions"
        return edge.recognise(
            "c", path, {"x-session-id": "s", **headers}, body, 0.0
        ).arrival.session

    assert key({}, {"cache_salt": "secret"}) == (salt_tenant("secret"), "s")
    assert key({"x-tenant-id": "t"}, {"cache_salt": "secret"}) == ("t", "s")
    for nothing in ({}, {"cache_salt": ""}, {"cache_salt": 7}, None):
        assert key({}, nothing) == ("", "s")
