from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.equivalence import compare

CHOICE = compare.Sample("a", (), (-12.5, -9.25), (False, True), {"acc": 1.0})
TEXT = compare.Sample("b", ("cache hit",), (), (), {"exact_match": 0.0, "chrf": ["x", "y"]})
RUN = compare.Results({("choice", 0): CHOICE, ("text", 0): TEXT}, {"choice/acc,none": 1.0})


def changed(key: compare.Key, **what: object) -> compare.Results:
    sample = replace(RUN.samples[key], **what)
    return compare.Results({**RUN.samples, key: sample}, RUN.scores)


def test_a_run_is_the_same_as_itself() -> None:
    assert compare.differences(RUN, RUN) == []


@pytest.mark.parametrize(
    ("key", "what", "told"),
    [
        (("text", 0), {"texts": ("cache miss",)}, "cache miss"),
        (("text", 0), {"texts": ()}, "[]"),
        (("text", 0), {"scores": {"exact_match": 1.0}}, "exact_match"),
        (("text", 0), {"prompt": "c"}, "another prompt"),
        (("choice", 0), {"greedy": (True, True)}, "greedy"),
        (("choice", 0), {"logprobs": (-12.5, -9.26)}, "-9.26"),
        (("choice", 0), {"logprobs": (-12.5,)}, "log probabilities"),
        (("choice", 0), {"logprobs": (-12.5, float("nan"))}, "nan"),
    ],
)
def test_any_change_of_a_sample_is_a_difference(
    key: compare.Key, what: dict[str, object], told: str
) -> None:
    (line,) = compare.differences(RUN, changed(key, **what))
    assert line.startswith(f"{key[0]} 0: ") and told in line


def test_log_probabilities_may_differ_by_the_tolerance_alone() -> None:
    near = changed(("choice", 0), logprobs=(-12.5, -9.25 - compare.TOLERANCE / 2))
    assert compare.differences(RUN, near) == []
    assert compare.largest_gap(RUN, near) == pytest.approx(compare.TOLERANCE / 2)
    assert compare.differences(RUN, near, tolerance=0.0)


def test_a_sample_that_one_run_lacks_and_another_score_are_differences() -> None:
    less = compare.Results({("choice", 0): CHOICE}, {"choice/acc,none": 0.5})
    for one, other in ((RUN, less), (less, RUN)):
        lines = compare.differences(one, other)
        assert lines[0] == "text 0: only one of the runs has it"
        assert lines[1].startswith("score choice/acc,none: ")


def test_nothing_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(compare.NoSamples, match="no samples"):
        compare.read(tmp_path)
    with pytest.raises(compare.NoSamples):
        compare.differences(compare.Results({}, {}), compare.Results({}, {}))


def test_what_the_harness_writes_is_read(tmp_path: Path) -> None:
    """Lines as version 0.4.13 writes them, shortened."""
    common = {"filter": "none", "doc_hash": "d", "target_hash": "t"}
    choice = {
        "doc_id": 3, "resps": [[["-20.5", "False"]], [["-4.25", "True"]]], "prompt_hash": "p",
        "metrics": ["acc"], "acc": 1.0,
    }  # fmt: skip
    text = {"doc_id": 1, "resps": [["an answer"]], "prompt_hash": "q", "metrics": []}
    folder = tmp_path / "model"
    folder.mkdir()
    for task, line in (("saga_choice", choice), ("saga_text", text)):
        path = folder / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl"
        path.write_text(json.dumps(line | common) + "\n")
    results = {"saga_choice": {"alias": "saga_choice", "acc,none": 0.25}}
    (folder / "results_2026-01-01.json").write_text(json.dumps({"results": results}))
    assert compare.read(tmp_path) == compare.Results(
        {
            ("saga_choice", 3): compare.Sample("p", (), (-20.5, -4.25), (False, True), {"acc": 1}),
            ("saga_text", 1): compare.Sample("q", ("an answer",), (), (), {}),
        },
        {"saga_choice/acc,none": 0.25},
    )
