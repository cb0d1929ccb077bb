"""What the page consists of: all of it is packaged, and none of it comes from elsewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vllm_saga import page

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_saga"
STATIC = PACKAGE / "page" / "static"
SVG = "http://www.w3.org/2000/svg"

FILES = page.load("x-tenant-id", "server")


def test_every_file_is_packaged_and_served():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["vllm_saga"]
    packaged = {found for pattern in patterns for found in PACKAGE.glob(pattern)}
    present = {path for path in STATIC.iterdir() if path.is_file()}
    assert present and present <= packaged
    names = {path.name for path in present} - {"index.html"}
    assert FILES.keys() == {"/saga"} | {f"/saga/{name}" for name in names}


@pytest.mark.parametrize("path", sorted(FILES))
def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup(path):
    text = FILES[path].body.decode().replace(SVG, "")
    assert not re.search(r"""https?:/|wss?:/|url\(|["'`(=]//""", text)
    assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|\beval\(|new Function", text)
    assert "localStorage" not in text and "cookie" not in text


@pytest.mark.parametrize("path", sorted(FILES))
def test_what_a_file_refers_to_is_served(path):
    text = FILES[path].body.decode()
    named = re.findall(r'(?:href|src)="([^"]+)"', text)
    named += [f"saga/{name}" for name in re.findall(r"from '\./([^']+)'", text)]
    assert named or path not in ("/saga", "/saga/page.js")
    assert {f"/{name}" for name in named} <= FILES.keys()


def test_the_page_is_told_who_serves_it_and_how_a_tenant_is_named():
    told = page.load('x"><script>', "router")["/saga"].body.decode()
    assert '<meta name="saga-served-by" content="router">' in told
    assert 'content="x&quot;&gt;&lt;script&gt;"' in told


def test_a_page_may_only_run_its_own_scripts():
    policy = page.HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy
    assert "unsafe" not in policy and "*" not in policy
    html = FILES["/saga"].body.decode()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", html)
