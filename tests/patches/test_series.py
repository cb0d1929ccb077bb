"""The series on vLLM's released sources, and on a copy of the installed vLLM that is then used.

Copies only: the installed vLLM is never touched.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

import pytest
import run
import sources
from test_patch_vllm import REPO, SERIES, content, patch_vllm

pytestmark = pytest.mark.released
INSTALLED = installed_version("vllm").partition("+")[0]
RELEASES = [f"{folder.name.removeprefix('vllm-')}.0" for folder in SERIES]
OUR_TESTS = [
    "tests/engine/test_blocks.py",
    "tests/engine/test_compat.py",
    "tests/engine/test_drain.py",
    "tests/engine/test_equivalence.py",
    "tests/engine/test_queue.py",
    "tests/engine/test_victims.py",
    "tests/patches/check_hooks.py",
]
long = pytest.mark.switch("SAGA_TEST_PATCHES", "vLLM's tests on patched copies, minutes each")
needs_series = pytest.mark.skipif(
    not sources.has_patches(INSTALLED), reason=f"no patches for the installed vLLM {INSTALLED}"
)


def files_of(series: Path) -> set[str]:
    """What the patches of a series change or add."""
    text = "".join(patch.read_text() for patch in series.iterdir())
    return set(re.findall(r"^diff --git a/(\S+) b/", text, re.MULTILINE))


def series_of(version: str) -> Path:
    return REPO / "patches" / f"vllm-{'.'.join(version.split('.')[:2])}"


def new_tests(version: str) -> list[str]:
    return sorted(name for name in files_of(series_of(version)) if name.startswith("tests/"))


@pytest.fixture
def released(request, tmp_path) -> Path:
    """The files that matter here of vLLM's source distribution, as released."""
    version = request.param
    wanted = files_of(series_of(version)) | {
        "vllm/__init__.py",
        "vllm/_version.py",
        "tests/v1/core/utils.py",
    }
    return sources.extract(sources.fetch_sdist(version), tmp_path, wanted.__contains__)


@pytest.mark.parametrize("released", RELEASES, indirect=True)
def test_the_series_applies_in_order_and_reverts_to_the_same_bytes(released):
    before = content(released)
    series = sorted(series_of(released.name.removeprefix("vllm-")).iterdir())
    status, output = patch_vllm("check", released)
    assert status == 0
    assert output.splitlines()[1:] == [f"{patch.name}: applies" for patch in series]
    assert content(released) == before

    assert patch_vllm("apply", released)[0] == 0
    after = content(released)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == files_of(series[0].parent)
    status, output = patch_vllm("check", released)
    assert status == 0
    assert output.splitlines()[1:] == [f"{patch.name}: applied" for patch in series]
    status, output = patch_vllm("apply", released)
    assert status == 1 and f"already applied, revert first: {series[0].name}" in output
    assert content(released) == after

    assert patch_vllm("revert", released)[0] == 0
    assert content(released) == before
    status, output = patch_vllm("revert", released)
    assert status == 1 and "none of the patches is applied" in output


@pytest.mark.parametrize("released", RELEASES, indirect=True)
def test_what_is_installed_has_no_tests_and_gets_none(released):
    (released / "tests" / "v1" / "core" / "utils.py").unlink()
    (released / "tests" / "v1" / "core").rmdir()
    assert patch_vllm("apply", released)[0] == 0
    assert not list((released / "tests").rglob("*.py"))


@pytest.mark.parametrize("released", RELEASES[:1], indirect=True)
def test_a_modified_tree_is_left_as_it_is(released):
    # The last patch does not fit: the first ones must not be left behind.
    client = released / "vllm" / "v1" / "engine" / "core_client.py"
    client.write_text(client.read_text().replace("min_score", "least_score"))
    before = content(released)
    for action in ("check", "apply"):
        status, output = patch_vllm(action, released)
        assert status == 1 and "nothing was changed" in output
        assert re.search(r"session-affinity.patch: does not apply, .*core_client.py", output)
        assert content(released) == before


@pytest.mark.parametrize("released", RELEASES[:1], indirect=True)
def test_some_patches_by_hand(released):
    """The first three are there: that is told, and revert takes out just these."""
    before = content(released)
    series = sorted(series_of(RELEASES[0]).iterdir())
    for patch in series[:3]:
        subprocess.run(["git", "apply", str(patch)], cwd=released, check=True)
    status, output = patch_vllm("check", released)
    states = [line.rpartition(" ")[2] for line in output.splitlines()[1:]]
    assert status == 0 and states == ["applied"] * 3 + ["applies"] * (len(series) - 3)
    status, output = patch_vllm("apply", released)
    assert status == 1 and output.rstrip().endswith(f"{series[1].name}, {series[2].name}")
    status, output = patch_vllm("revert", released)
    assert status == 0 and "reverted 3 patches" in output
    assert content(released) == before


@pytest.fixture(scope="module")
def patched_copy(tmp_path_factory) -> Path:
    found = find_spec("vllm")
    package = Path(found.origin).parent
    tests = sources.fetch_tests(INSTALLED)
    return sources.make_patched_copy(tmp_path_factory.mktemp("patched"), package, tests)


def run_ours(copy: Path, *tests: str) -> str:
    """Our tests with the patched copy as their vLLM; the last lines of the output."""
    ours = {"PYTHONPATH": f"{copy}{os.pathsep}{REPO}", "PATCHED_VLLM": str(copy)}
    env = sources.clean_environment() | ours
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@needs_series
@pytest.mark.timeout(900)
def test_ours_with_the_hooks_in_use(patched_copy):
    assert re.match(r"\d+ passed in", run_ours(patched_copy, *OUR_TESTS))


@needs_series
@pytest.mark.timeout(900)
def test_the_tests_in_the_patches(patched_copy):
    gate = run.Gate(new_tests(INSTALLED), sources.make_stand_ins())
    outcomes = run.run_pytest("patched", patched_copy, gate).outcomes
    assert set(outcomes.values()) == {"passed"}
    assert {test.partition("::")[0] for test in outcomes} == set(new_tests(INSTALLED))


@long
@needs_series
@pytest.mark.timeout(900)
def test_a_real_engine(patched_copy):
    assert re.match(r"1 passed in", run_ours(patched_copy, "tests/patches/check_engine.py"))


@long
@needs_series
@pytest.mark.timeout(1800)
def test_a_real_server(patched_copy):
    live = ("check_patches.py", "test_serve.py", "test_endpoints_live.py")
    said = run_ours(patched_copy, *(f"tests/live/{name}" for name in live), "-m", "smoke")
    assert re.match(r"4 passed, \d+ deselected in", said)


@long
@needs_series
@pytest.mark.timeout(1800)
def test_all_of_ours_that_touch_the_engine(patched_copy):
    folders = ("tests/engine", "tests/faults", "tests/simulator", "tests/server")
    run_ours(patched_copy, *folders, "-m", "not live")


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", [v for v in RELEASES if v != INSTALLED])
def test_vllm_s_own_tests_on_sources_that_are_not_installed(version, tmp_path):
    """As released, Python files of vLLM run their scheduler tests without being built."""

    def is_wanted(name: str) -> bool:
        return name.startswith(("vllm/", "tests/"))

    source = sources.extract(sources.fetch_sdist(version), tmp_path, is_wanted)
    files = [name for name in run.CORE if (source / name).exists()]
    gate = run.Gate(files, sources.make_stand_ins())
    stock = run.run_pytest("stock", source, gate)
    copy = sources.make_patched_copy(tmp_path / "patched", source / "vllm", source)
    patched = run.run_pytest("patched", copy, gate)
    assert run.patched_problems(stock, patched) == []
    assert sum(outcome == "passed" for outcome in stock.outcomes.values()) > 500
    hooks = run.run_pytest("hooks", copy, gate)
    assert run.patched_problems(stock, hooks, "hooks") == run.problems(stock, hooks) == []
    own = run.run_pytest("patched", copy, run.Gate(new_tests(version), gate.redirects))
    assert set(own.outcomes.values()) == {"passed"}
