"""`scripts/fuzz`: what it prints, and what it keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import run_fuzz
from fuzz_registry import Target
from hypothesis import strategies as st

SCRIPT = Path(__file__).with_name("run_fuzz.py")


def test_it_runs_what_is_asked_for_and_says_what_came_of_it(tmp_path):
    command = [sys.executable, str(SCRIPT), "--minutes", "0.01", "--output", str(tmp_path), "loads"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    heading, row = done.stdout.splitlines()[-2:]
    assert heading.split() == ["target", "examples", "minutes", "failures"]
    name, examples, _, failures = row.split()
    assert (name, failures) == ("loads", "0") and int(examples) >= run_fuzz.BATCH


def test_what_fails_is_kept_and_tried_first_the_next_time(tmp_path):
    tried: list[int] = []

    def check(value: int) -> None:
        tried.append(value)
        if value >= 1000:
            raise KeyError(value)

    target = Target("numbers", st.integers(), check)
    outcome = run_fuzz.fuzz(target, 1.0, tmp_path)
    assert outcome.failures == 1 and outcome.examples == len(tried)
    assert "KeyError: 1000" in (tmp_path / "numbers.txt").read_text()
    tried.clear()
    assert run_fuzz.fuzz(target, 1.0, tmp_path).failures == 1
    assert tried[0] == 1000


def test_an_input_that_takes_too_long_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz_registry.MOST_S", 1)

    def hang(value: object) -> None:
        while True:
            pass

    outcome = run_fuzz.fuzz(Target("slow", st.just(1), hang), 1.0, tmp_path)
    assert outcome.failures == 1
    assert "more than 1 s for one input" in (tmp_path / "slow.txt").read_text()
