"""What the engine has learned survives it, and no file can harm it."""

from __future__ import annotations

import pytest

from vllm_saga.engine.memory import GraphFile
from vllm_saga.policy.graph import AgentClasses
from vllm_saga.policy.memory import encode, snapshot


def taught() -> AgentClasses:
    classes = AgentClasses()
    for _ in range(30):
        agent = classes.get(("", b"hash"))
        agent.observe_call("bash", "read", 100)
        agent.gaps_after("read").observe_return(30.0)
    return classes


def settle(file: GraphFile) -> None:
    assert file._writer is not None
    file._writer.join()


def test_a_restart_goes_on_where_the_last_run_ended(tmp_path):
    path = tmp_path / "deep" / "graph.json"
    GraphFile(path, 60.0).save_now(taught())
    classes = AgentClasses()
    assert GraphFile(path, 60.0).load(classes)
    assert snapshot(classes) == snapshot(taught())
    assert [entry.name for entry in path.parent.iterdir()] == ["graph.json"]


def test_saves_come_at_their_interval(tmp_path):
    path, classes = tmp_path / "graph.json", taught()
    file = GraphFile(path, 60.0)
    file.maybe_save(classes, 1000.0)
    file.maybe_save(classes, 1059.0)
    assert not path.exists()
    file.maybe_save(classes, 1060.0)
    settle(file)
    assert path.read_bytes() == encode(snapshot(classes))
    path.unlink()
    file.maybe_save(classes, 1119.0)
    assert not path.exists()
    file.maybe_save(classes, 1121.0)
    settle(file)
    assert path.exists()


def test_no_file_is_a_fresh_start(tmp_path):
    assert not GraphFile(tmp_path / "none.json", 60.0).load(AgentClasses())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"{", b'{"format": "vllm-saga graph", "version": 2}'])
def test_a_file_without_sense_is_put_aside(tmp_path, data):
    path, classes = tmp_path / "graph.json", AgentClasses()
    path.write_bytes(data)
    assert not GraphFile(path, 60.0).load(classes)
    assert snapshot(classes) == snapshot(AgentClasses())
    assert not path.exists()
    assert (tmp_path / "graph.json.bad").read_bytes() == data


def test_a_directory_in_the_files_place_harms_nobody(tmp_path):
    path = tmp_path / "graph.json"
    path.mkdir()
    file = GraphFile(path, 60.0)
    assert not file.load(AgentClasses())
    file.save_now(taught())
    assert [entry.name for entry in tmp_path.iterdir()] == ["graph.json"]
