"""The benchmark of many engines: its command, on small engines."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import replicas

APP = typer.Typer()
APP.command()(replicas.main)
SMALL = ["--replicas", "2", "--sessions", "3", "--kv-tokens", "120000", "--processes", "1"]


def run(*options: str, rate: str = "2"):
    return CliRunner().invoke(APP, [*SMALL, "--rate", rate, *options])


def test_arrangements_are_compared_on_the_same_work(tmp_path):
    arms = "vllm@sticky,saga@saga"
    said = run("--percent", "80", "--arrangements", arms, "--output", str(tmp_path))
    assert said.exit_code == 0, said.output
    document = json.loads((tmp_path / "open-80.json").read_text())
    by_name = {each["policy"]: each for each in document["runs"]}
    assert set(by_name) == {"vllm@sticky", "saga@saga"}
    assert {each["sessions"] for each in by_name.values()} == {6}
    (pair,) = document["paired"]
    assert pair["baseline"] == "vllm@sticky" and pair["task_completion_ratio"]["mean"] > 0.0
    # Sticky sessions stay, whatever they meet there.
    assert by_name["vllm@sticky"]["notes"]["co_location"] == 1.0


def test_the_mix_has_as_many_of_each():
    mix = replicas.mixed(["W1", "W3"], None, 5)
    assert len(mix) == 20
    longest = [max(s.calls[-1].prompt_tokens for s in mix[first::2]) for first in (0, 1)]
    assert longest[0] > longest[1]  # coding agents' contexts grow, browser agents edit theirs


@pytest.mark.parametrize(
    ("arms", "told"), [("vllm", "vllm"), ("vllm@nowhere", "nowhere"), ("nobody@saga", "nobody")]
)
def test_what_is_unknown_is_said_before_anything_runs(arms, told, tmp_path):
    said = run("--arrangements", arms, "--output", str(tmp_path / "out"))
    assert said.exit_code == 2 and told in said.output
    assert not (tmp_path / "out").exists()
