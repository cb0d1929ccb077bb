"""What the request router does with Ray's events; needs no Ray."""

from __future__ import annotations

import ast
import importlib.util
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray_fleet import documented

from vllm_saga.policy.clients import Rules
from vllm_saga.ray.dispatch import NUMBER, REPORT, Dispatch, Placed
from vllm_saga.ray.requests import read, tell
from vllm_saga.router.edge import Edge
from vllm_saga.router.placement import SagaPlacer

POOL = 100_000


@dataclass
class Body:
    """As the parsed requests of Ray Serve LLM: fields as attributes."""

    messages: list[Any] = field(default_factory=list)
    vllm_xargs: dict[str, object] | None = None


class Tool:
    """As vLLM's parsed tools: an object of pydantic's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def model_dump(self, exclude_unset: bool) -> dict[str, object]:
        return {"type": "function", "function": {"name": self.name}}


class Replicas:
    """A `Dispatch` over replicas named r0, r1, ...; its clock is `now`."""

    def __init__(self, count: int = 2, patience_s: float = 2.0, told_of_ends: bool = True) -> None:
        edge = Edge(Rules(), 1_000, 1_800.0)
        self.placer = SagaPlacer()
        self.dispatch = Dispatch(self.placer, edge, patience_s, told_of_ends)
        self.now = 0.0
        self._ids = itertools.count()
        self.stats: dict[str, dict[str, Any]] = {f"r{index}": {} for index in range(count)}
        self.update()

    def update(self) -> None:
        self.dispatch.update(self.stats, self.now)

    def report(self, name: str, number: int, sessions: tuple[str, ...] = (), used: int = 0) -> None:
        self.stats[name] = {
            NUMBER: number,
            REPORT: {
                "started": name, "kv_tokens": POOL, "used_tokens": used, "running": 0,
                "waiting": 0, "resident": max(used // 10_000, 1),
                "sessions": [["", name] for name in sessions],
            },
        }  # fmt: skip
        self.update()

    def place(self, session: str | None, tokens: int = 1_000, call_id: str = "") -> Placed:
        headers = {"X-Session-ID": session} if session else {}
        args = [SimpleNamespace(prompt=[1] * tokens), SimpleNamespace(headers=headers)]
        call_id = call_id or f"c{next(self._ids)}"
        placed = self.dispatch.place(call_id, read("completions", args, ""), self.now)
        assert placed is not None
        return placed

    def call(self, session: str | None, tokens: int = 1_000) -> str:
        """A call from its arrival to its end; where it went."""
        placed = self.place(session, tokens)
        self.now += 1.0
        self.dispatch.finished(placed.recognised.arrival.call_id, placed.replica, self.now)
        return placed.replica


# -- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "from_ray", "expected"),
    [
        ({"X-Session-ID": "a"}, "", ("a", "vllm")),
        ({"X-Claude-Code-Session-Id": "b"}, "", ("b", "claude-code")),
        ({}, "c", ("c", "vllm")),
        ({"x-session-id": "a"}, "c", ("a", "vllm")),
    ],
)
def test_a_session_is_named_by_the_rules_of_the_router(headers, from_ray, expected):
    asked = read("chat", [Body(), SimpleNamespace(headers=headers)], from_ray)
    recognised = Edge(Rules(), 10, 60.0).recognise("c1", asked.path, asked.headers, asked.body, 0.0)
    assert recognised.arrival.session == ("", expected[0])
    assert recognised.source == expected[1]


def test_prompts_and_shared_prefixes_are_read_from_parsed_requests():
    system = {"role": "system", "content": "x" * 400}
    edge = Edge(Rules(), 10, 60.0)

    def arrival(tool: str, text: str):
        body = Body([system, {"role": "user", "content": text}])
        body.tools = [Tool(tool)]  # type: ignore[attr-defined]
        asked = read("chat", [body], "")
        return edge.recognise(text, asked.path, asked.headers, asked.body, 0.0).arrival

    first, second, third = arrival("bash", "one"), arrival("bash", "two"), arrival("edit", "three")
    assert 100 <= first.prompt_tokens <= 200
    assert first.prefix == second.prefix != third.prefix


def test_a_method_that_computes_on_no_prompt_has_no_tokens():
    args = [SimpleNamespace(input="a long text" * 100), SimpleNamespace(headers={})]
    asked = read("embeddings", args, "")
    recognised = Edge(Rules(), 10, 60.0).recognise("c1", asked.path, asked.headers, asked.body, 0.0)
    assert recognised.arrival.prompt_tokens == 0
    assert recognised.arrival.session is None


def test_the_engine_is_told_whose_call_it_is():
    raw = SimpleNamespace(
        headers={"x-claude-code-session-id": "root", "x-claude-code-agent-id": "sub"}
    )
    body = Body(vllm_xargs={"other": 1})
    placed = Replicas().dispatch.place("c1", read("chat", [body, raw], ""), 0.0)
    tell([body, raw], placed.recognised)
    assert raw.headers["x-session-id"] == placed.recognised.arrival.session[1] != "root"
    assert body.vllm_xargs == {"other": 1, "saga_parent": "root"}


def test_what_vllm_reads_by_itself_is_left_alone():
    raw, body = SimpleNamespace(headers={"x-session-id": "a"}), Body()
    placed = Replicas().dispatch.place("c1", read("chat", [body, raw], ""), 0.0)
    tell([body, raw], placed.recognised)
    assert raw.headers == {"x-session-id": "a"}
    assert body.vllm_xargs is None


# -- placement --------------------------------------------------------------------------------


def test_a_session_stays_and_sessions_spread():
    replicas = Replicas()
    homes = {name: replicas.call(name) for name in "abcdef"}
    assert set(homes.values()) == {"r0", "r1"}
    for _ in range(3):
        assert {name: replicas.call(name, 3_000) for name in homes} == homes


def test_a_conversation_without_an_id_stays():
    replicas = Replicas(4)
    said: list[Any] = [{"role": "user", "content": "fix the build " * 20}]
    homes = set()
    for turn in range(5):
        asked = read("chat", [Body(list(said)), SimpleNamespace(headers={})], "")
        placed = replicas.dispatch.place(f"t{turn}", asked, replicas.now)
        homes.add(placed.replica)
        replicas.dispatch.finished(f"t{turn}", placed.replica, replicas.now)
        said += [{"role": "assistant", "content": f"ran {turn}"}, {"role": "user", "content": "go"}]
    assert len(homes) == 1


def test_a_new_session_goes_where_the_engines_have_room():
    replicas = Replicas()
    replicas.report("r0", 1, used=90_000)
    replicas.report("r1", 1, used=10_000)
    assert {replicas.call(f"s{index}") for index in range(8)} == {"r1"}


def test_a_router_that_knows_nothing_finds_sessions_by_the_reports():
    replicas = Replicas(4)
    replicas.report("r2", 1, sessions=("mine",), used=50_000)
    placed = replicas.place("mine")
    assert (placed.replica, placed.reason) == ("r2", "report")


def test_two_routers_place_alike_without_talking():
    one, other = Replicas(4), Replicas(4)
    assert [one.place(f"s{i}").replica for i in range(1)] == [
        other.place(f"s{i}").replica for i in range(1)
    ]


def test_a_report_counts_once():
    replicas = Replicas()
    replicas.report("r0", 1)
    before = replicas.placer.loads["r0"].report
    replicas.now = 5.0
    replicas.update()
    assert replicas.placer.loads["r0"].report is before
    replicas.report("r0", 2)
    assert replicas.placer.loads["r0"].report.at == 5.0


# -- what goes wrong --------------------------------------------------------------------------


def test_the_sessions_of_a_dead_replica_move():
    replicas = Replicas(3)
    homes = {f"s{index}": replicas.call(f"s{index}") for index in range(9)}
    dead = homes["s0"]
    replicas.dispatch.remove(dead)
    for name, home in homes.items():
        now_at = replicas.call(name)
        assert now_at != dead
        assert home in (now_at, dead)


def test_a_call_that_died_with_its_replica_is_placed_again():
    replicas = Replicas()
    first = replicas.place("a", call_id="c")
    replicas.dispatch.remove(first.replica)
    second = replicas.place("a", call_id="c")
    assert second.replica != first.replica
    # Ray tells of the first attempt's end only now.
    replicas.dispatch.finished("c", first.replica, replicas.now)
    assert len(replicas.dispatch) == 1
    replicas.dispatch.finished("c", second.replica, replicas.now)
    assert len(replicas.dispatch) == 0


def test_a_replica_that_takes_no_call_is_left_after_a_while():
    replicas = Replicas(patience_s=2.0)
    first = replicas.place("a", call_id="c")
    replicas.now = 1.9
    again = replicas.place("a", call_id="c")
    assert again.replica == first.replica
    assert (first.fresh, again.fresh) == (True, False)
    replicas.now = 2.1
    assert replicas.place("a", call_id="c").replica != first.replica


def test_the_only_replica_is_waited_for():
    replicas = Replicas(1)
    replicas.place("a", call_id="c")
    replicas.now = 60.0
    assert replicas.place("a", call_id="c").replica == "r0"


def test_no_replica_no_place():
    replicas = Replicas(0)
    assert replicas.dispatch.place("c", read("chat", [], "a"), 0.0) is None


def test_callers_who_give_up_leave_nothing():
    replicas = Replicas()
    replicas.place("a", call_id="c")
    replicas.dispatch.given_up("c", 1.0)
    replicas.dispatch.given_up("c", 1.0)
    assert len(replicas.dispatch) == 0
    assert not any(replica.calls for replica in replicas.placer.replicas.values())


def test_without_word_of_ends_nothing_adds_up():
    replicas = Replicas(told_of_ends=False)
    homes = {replicas.place("a").replica for _ in range(50)}
    assert len(homes) == 1
    assert len(replicas.dispatch) == 0
    assert not any(replica.calls for replica in replicas.placer.replicas.values())


def test_no_call_is_ever_moved_once_placed():
    replicas = Replicas()
    replicas.report("r0", 1)
    home = replicas.place("a", 90_000).replica
    other = "r1" if home == "r0" else "r0"
    report = replicas.stats.setdefault(home, {})
    replicas.report(home, 2, used=POOL)
    report = replicas.stats[home][REPORT]
    report["held_calls"] = [
        {"tenant": "", "session": "a", "new": True, "held_s": 90.0, "tokens": 90_000}
    ]
    replicas.stats[home] = {NUMBER: 3, REPORT: report}
    replicas.report(other, 1)
    for _ in range(20):
        replicas.now += 0.5
        replicas.place(None)
    session = replicas.placer.sessions.get(("", "a"))
    assert session.home.replica.name == home


# -- the page ---------------------------------------------------------------------------------


def test_the_classes_that_the_page_names_are_there():
    config = documented()
    paths = [
        config["server_cls"],
        config["deployment_config"]["request_router_config"]["request_router_class"],
    ]
    for path in paths:
        module, _, name = path.rpartition(".")
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None
        defined = [n.name for n in ast.walk(ast.parse(Path(found.origin).read_text()))
                   if isinstance(n, ast.ClassDef)]  # fmt: skip
        assert name in defined
    assert config["engine_kwargs"]["scheduler_cls"] == "saga"
