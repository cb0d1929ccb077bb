"""scripts/patch-vllm where it must refuse: nothing may be changed, and the message says why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SERIES = sorted((REPO / "patches").glob("vllm-*"))


def patch_vllm(action: str, target: Path) -> tuple[int, str]:
    """Exit status and everything said."""
    command = [
        sys.executable,
        str(REPO / "scripts" / "patch-vllm"),
        action,
        "--target",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def tree(root: Path, version: str | None, **files: str) -> Path:
    package = root / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    if version is not None:
        (package / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return root


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("action", ["apply", "check", "revert"])
@pytest.mark.parametrize(
    "version, said",
    [
        ("0.99.1", r"no patches for vLLM 0.99.1 .*there are for: 0.32, 0.33"),
        (None, "cannot tell the version: .*_version.py is missing"),
        ("0.32.0", "none of the patches is applied|does not fit .*nothing was changed"),
    ],
)
def test_trees_that_cannot_be_patched(tmp_path, action, version, said):
    root = tree(tmp_path / "site", version)
    before = content(root)
    status, output = patch_vllm(action, root)
    assert status == 1
    assert re.search(said, output), output
    assert content(root) == before


def test_a_folder_without_vllm_is_named(tmp_path):
    status, output = patch_vllm("check", tmp_path)
    assert status == 1 and f"{tmp_path} holds no package vllm/" in output


def test_every_patch_is_one_a_reviewer_can_read():
    """Number and name, subject, reason, the discussion it belongs to, and tests of its own."""
    assert [folder.name for folder in SERIES] == ["vllm-0.32", "vllm-0.33"]
    for folder in SERIES:
        patches = sorted(folder.iterdir())
        assert [p.name[:5] for p in patches] == [f"{n:04}-" for n in range(1, len(patches) + 1)]
        assert [p.name for p in patches] == [p.name for p in sorted(SERIES[0].iterdir())]
        for patch in patches:
            header, _, diff = patch.read_text().partition("\n---\n")
            assert "\nSubject: [" in header and "\nRelated: " in header, patch.name
            assert max(map(len, header.splitlines())) <= 78, patch.name
            changed = set(re.findall(r"^diff --git a/(\w+)/", diff, re.MULTILINE))
            assert {"tests", "vllm"} <= changed <= {"tests", "vllm", "docs"}, patch.name
            assert len(re.findall(r"^diff --git", diff, re.MULTILINE)) <= 5, patch.name


def test_a_checkout_is_known_by_its_tag(tmp_path):
    root = tree(tmp_path / "checkout", None)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v0.99.1"]):
        subprocess.run([*git, *command], check=True)
    status, output = patch_vllm("check", root)
    assert status == 1 and "no patches for vLLM 0.99.1" in output
