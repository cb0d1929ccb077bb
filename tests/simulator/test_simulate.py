"""`vllm-saga simulate`, the whole of it: the same figures every time, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from agents import SMALL, many
from typer.testing import CliRunner

from vllm_saga.simulator.command import app
from vllm_saga.simulator.result import TIMING_FIELDS

#: Made by `simulate` below with vLLM 0.32. They change only when a decision changes: if one should,
#: say so in the commit, and write the new ones with `python tests/simulator/test_simulate.py`.
GOLDEN = Path(__file__).with_name("golden.json")
QUESTION = "--load closed:14 --policy vllm --policy saga --policy saga-lineage --processes 1"


def files(directory):
    """A trace and a machine in files, as a user has them."""
    trace, machine = directory / "trace.jsonl", directory / "small.json"
    trace.write_bytes(b"\n".join(map(msgspec.json.encode, many(24, first=1500))))
    machine.write_bytes(msgspec.json.encode(SMALL))
    return ["--trace", str(trace), "--hardware", str(machine)]


def simulate(directory, *more):
    path = directory / "out.json"
    done = CliRunner().invoke(
        app, [*files(directory), *QUESTION.split(), "--json", str(path), *more]
    )
    assert done.exit_code == 0, done.output
    document = json.loads(path.read_text())
    for run in document["runs"]:
        for field in TIMING_FIELDS:
            del run[field]
    return document, done.output


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("golden"))


def test_the_same_question_twice_has_the_same_answer(answer, tmp_path):
    assert simulate(tmp_path)[0]["runs"] == answer[0]["runs"]


def test_golden_numbers(answer):
    golden = json.loads(GOLDEN.read_text())
    assert [run["policy"] for run in answer[0]["runs"]] == ["vllm", "saga", "saga-lineage"]
    for run, expected in zip(answer[0]["runs"], golden["runs"], strict=True):
        assert flat(run) == pytest.approx(flat(expected), rel=1e-9), run["policy"]


def test_saga_has_the_settings_of_the_file_that_a_server_reads(answer, tmp_path, monkeypatch):
    settings = tmp_path / "saga.yaml"
    settings.write_text("residency: false\n")
    monkeypatch.setenv("SAGA_CONFIG", str(settings))
    there = {run["policy"]: run["step_wait_s"] for run in simulate(tmp_path)[0]["runs"]}
    before = {run["policy"]: run["step_wait_s"] for run in answer[0]["runs"]}
    assert there["vllm"] == before["vllm"]
    assert there["saga"]["mean"] > 2.0 * before["saga"]["mean"]


def test_the_table_names_every_policy_and_the_gain(answer):
    document, text = answer
    gain = document["paired"][0]["task_completion_ratio"]["mean"]
    assert gain > 1.3
    assert "saga-lineage" in text
    assert f"{gain:.2f}" in text


def test_the_static_cap_is_searched_and_pictures_are_drawn(tmp_path):
    pictures = tmp_path / "pictures"
    document, _ = simulate(tmp_path, "--policy", "static-cap:auto", "--plot", str(pictures))
    assert document["runs"][-1]["policy"] == f"static-cap:{document['config']['static_cap']}"
    assert len(list(pictures.glob("*.png"))) == 4


def test_an_open_load_relative_to_stock_s_saturation(tmp_path):
    document, _ = simulate(tmp_path, "--load", "open:auto60")
    most = document["config"]["saturation_per_min"]
    assert 0 < document["runs"][0]["tasks_per_min"] < most


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--policy magic", "saga-oracle"),
        ("--load often", "closed:N"),
        ("--load open:-3", "above 0"),
        ("--hardware abacus", "llama3-8b-h100"),
        ("--trace builtin:chess", "claude-code"),
        ("--trace /nowhere.jsonl", "builtin:swe"),
        ("--placement far", "sticky"),
        ("--kv-tokens 500", "fits"),
    ],
)
def test_a_mistake_is_answered_with_what_is_allowed(arguments, says):
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output


def flat(value, name=""):
    """Numbers by their path; what is no number has to be equal as text."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
    if isinstance(value, int | float):
        return {name: value}
    return {f"{name}={value}": 0}


if __name__ == "__main__":
    import tempfile

    made, _ = simulate(Path(tempfile.mkdtemp()))
    GOLDEN.write_text(json.dumps({"runs": made["runs"]}, indent=1) + "\n")
