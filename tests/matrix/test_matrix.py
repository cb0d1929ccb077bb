"""scripts/test --matrix: which versions are asked for, how a step is judged, and what is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import environments
import pytest
import table
from steps import STEPS, Outcome, Trial, compared, counted
from versions import MATRIX, UnknownVersionError, Version, choose

from vllm_saga.doctor.versions import OLDEST, TESTED

REPO = Path(__file__).parents[2]
NEW, OLD = Version("0.33.0", built=False), Version("0.26.0", built=False, supported=False)
GOOD = {step: Outcome(True, "9 passed", 12.3) for step in STEPS}


def test_the_supported_versions_are_those_that_the_plugin_claims():
    supported = [version.series for version in MATRIX if version.supported]
    claimed = [f"{major}.{minor}" for major, minor in (OLDEST, TESTED)]
    assert [supported[0], supported[-1]] == claimed


def test_scripts_setup_makes_one_of_them():
    default = re.search(r"SETUP_VLLM:-([\d.]+)", (REPO / "scripts" / "setup").read_text())
    assert default[1] in {version.number for version in MATRIX if version.built}


def test_versions_by_either_name_in_the_matrix_s_order():
    assert [v.number for v in choose(["0.33", "0.28.0", "0.28"])] == ["0.28.0", "0.33.0"]
    assert choose([]) == MATRIX


def test_an_unknown_version_is_refused_with_those_there_are():
    with pytest.raises(UnknownVersionError, match=r"0\.1, x; there are: 0\.26, 0\.28"):
        choose(["0.28", "0.1", "x"])


def matrix(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "tests" / "matrix" / "run_matrix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["0.29.7"], "not in the matrix: 0.29.7; there are: 0.26"),
        (["0.32", "--step", "lunch"], "'contract', 'golden', 'upstream', 'serve'"),
        (["--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_mistakes_on_the_command_line(arguments, says):
    done = matrix(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and "scripts/test --matrix" in done.stderr


def test_scripts_test_has_it_first_or_not_at_all():
    command = [str(REPO / "scripts" / "test"), "--quick", "--matrix"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "give it first" in done.stderr


def junit(path: Path, **counts: int) -> Path:
    path.write_text(
        "<testsuites><testsuite "
        + " ".join(f'{name}="{count}"' for name, count in counts.items())
        + "/></testsuites>"
    )
    return path


def test_counts_of_a_report(tmp_path):
    report = junit(tmp_path / "a.xml", tests=10, failures=1, errors=2, skipped=3)
    assert counted(report) == "4 passed, 3 failed"
    assert counted(junit(tmp_path / "b.xml", tests=5, failures=0, errors=0)) == "5 passed"
    assert counted(tmp_path / "none.xml") == "ended early"


def test_outcomes_of_both_schedulers_are_compared(tmp_path):
    stock = {"a": "passed", "b": "failed", "c": "passed", "d": "error"}
    for name, outcomes in ("stock", stock), ("saga", stock):
        (tmp_path / f"{name}.json").write_text(json.dumps({"outcomes": outcomes}))
    assert compared(tmp_path) == "2 pass with both, 2 fail with both"
    changed = stock | {"a": "failed", "e": "passed"}
    (tmp_path / "saga.json").write_text(json.dumps({"outcomes": changed}))
    assert compared(tmp_path) == "1 pass with both, 2 fail with both, 2 differ"
    (tmp_path / "saga.json").unlink()
    assert compared(tmp_path) == "ended early"


def test_a_table_for_people_and_one_for_the_readme():
    failing = GOOD | {"golden": Outcome(False, "1 failed", 4.0), "serve": Outcome(None, "no build")}
    results = {OLD: failing, NEW: {"contract": GOOD["contract"]}}
    text = table.as_text(results).splitlines()
    assert text[0].split() == ["vLLM", *STEPS]
    assert len({line.find("9 passed") for line in text[1:]}) == 1
    assert "FAILED: 1 failed (4 s)" in text[1] and "no build" in text[1] and "not run" in text[2]
    markdown = table.as_markdown(results).splitlines()
    assert {line.count("|") for line in markdown} == {len(STEPS) + 2}
    assert "(12 s)" not in "".join(markdown) and "best effort" in markdown[2]


def test_the_readme_s_table_is_of_this_matrix():
    text = (REPO / "README.md").read_text().partition("## vLLM versions\n")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    made = table.as_markdown(dict.fromkeys(MATRIX, GOOD)).splitlines()
    assert rows[0] == made[0]
    assert [row.split("|")[1] for row in rows] == [row.split("|")[1] for row in made]


def test_only_a_supported_version_fails_the_matrix():
    bad = GOOD | {"golden": Outcome(False, "1 failed")}
    assert table.failures({OLD: bad, NEW: GOOD}) == []
    assert table.failures({NEW: bad}) == ["vLLM 0.33.0: golden: 1 failed"]
    nothing = {"environment": Outcome(False, "no space left")}
    assert table.failures({NEW: nothing}) == ["vLLM 0.33.0: environment: no space left"]
    assert "no space left" in table.as_text({NEW: nothing})


def test_an_environment_that_cannot_be_made_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "CACHE", tmp_path)

    def fail(version):
        raise environments.SourceError("'pip download' failed")

    monkeypatch.setattr(environments.sources, "fetch_sdist", fail)
    with pytest.raises(environments.EnvironmentFailedError, match="'pip download' failed"):
        environments.make(Version("0.99.0", built=False))


def test_a_step_is_judged_by_pytest_and_its_output_kept(tmp_path):
    trial = Trial(NEW, Path(sys.executable), tmp_path)
    for body, ok, said in ("pass", True, "1 passed"), ("1 / 0", False, "0 passed, 1 failed"):
        (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
        assert trial.pytest("x", str(tmp_path / "test_it.py")) == (ok, said)
    assert "ZeroDivisionError" in (tmp_path / "x.log").read_text()


def test_what_was_not_built_does_not_serve(tmp_path):
    assert Trial(NEW, Path("nowhere"), tmp_path).run("serve") == Outcome(None, "no CPU build")
