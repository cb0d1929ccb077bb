"""Pictures and figures of the docs show the results that are committed."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, links, pages

from benchmarks import docs_plots
from benchmarks.docs_plots import PICTURE_OF, PICTURES, average, digest

LARGEST = 150_000
#: | W1 SWE-agent, 2 | 3230 → 710 s, **4.55x** | 41.96 → 4.05 s | 17 → 93 % |
_ROW = re.compile(
    r"^\| (W\d) [^|]*, ([\d.]+) \| (\d+) → (\d+) s, (?:\*\*([\d.]+)x\*\*|tie) "
    r"\| ([\d.]+) → ([\d.]+) s \| (\d+) → (\d+) % \|",
    re.MULTILINE,
)


@pytest.mark.parametrize("name", PICTURE_OF)
def test_pictures_are_drawn_from_present_results(name):
    _, drawn_from = PICTURE_OF[name]()
    text = (PICTURES / f"{name}.svg").read_text()
    assert digest(drawn_from) in text, "stale: run python -m benchmarks.docs_plots"
    assert len(text) < LARGEST


def test_every_picture_is_shown_somewhere():
    shown = {(page.parent / link).resolve() for page in pages() for link in links(page)}
    assert {PICTURES / f"{name}.svg" for name in PICTURE_OF} <= shown
    assert {path for path in PICTURES.glob("*") if path not in shown} == set()


def test_the_digest_is_of_the_figures():
    assert digest({"a": 1}) != digest({"a": 2})


def test_figures_of_the_readme_are_those_of_the_sweep():
    found = _ROW.findall((ROOT / "README.md").read_text())
    assert len(found) >= 4
    for workload, overcommit, stock, saga, gain, waited, waits, hit, hits in found:
        load = str(float(overcommit))

        def mean(policy, path, workload=workload, load=load):
            return average(workload, load, policy, path)

        took = [mean(policy, "task_completion_s/mean") for policy in ("vllm", "saga")]
        assert [int(stock), int(saga)] == [round(value) for value in took]
        ratio = took[0] / took[1]
        assert f"{ratio:.2f}" == gain if gain else abs(ratio - 1) < 0.05
        wait = [mean(policy, "step_wait_s/mean") for policy in ("vllm", "saga")]
        assert [waited, waits] == [f"{value:.2f}" for value in wait]
        rates = [100 * mean(policy, "prefix_hit_rate") for policy in ("vllm", "saga")]
        assert [int(hit), int(hits)] == [round(rate) for rate in rates]


def test_the_table_has_every_workload_that_was_swept():
    points = docs_plots.RESULTS / "sweep" / "points"
    swept = {path.name[:2] for path in points.glob("W*-overcommit-2.0.json")}
    assert {row[0] for row in _ROW.findall((ROOT / "README.md").read_text())} >= swept
