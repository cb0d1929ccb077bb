from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.equivalence import tasks


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, str]:
        folder = tasks.write(tmp_path / name, 3, seed)
        return {path.name: path.read_text() for path in folder.glob("*.jsonl")}

    assert made("one", 7) == made("two", 7) != made("three", 8)


def test_prompts_are_long_begin_alike_and_end_differently() -> None:
    docs = tasks.documents(5, 0)
    prompts = [doc["prompt"] for doc in docs[tasks.CHOICE] + docs[tasks.TEXT]]
    assert len(set(prompts)) == 10
    assert len({prompt[:500] for prompt in prompts}) == 1


def test_a_choice_has_one_right_answer() -> None:
    for doc in tasks.documents(20, 0)[tasks.CHOICE]:
        assert len(set(doc["choices"])) == 4 and 0 <= doc["answer"] < 4


def test_each_task_reads_its_own_documents(tmp_path: Path) -> None:
    folder = tasks.write(tmp_path, 4, 0)
    for name in (tasks.CHOICE, tasks.TEXT, tasks.CHAT):
        task = yaml.safe_load((folder / f"{name}.yaml").read_text())
        path = Path(task["dataset_kwargs"]["data_files"]["test"])
        docs = [json.loads(line) for line in path.read_text().splitlines()]
        assert task["task"] == name and len(docs) == 4
        assert task["doc_to_target"] in (*docs[0], "{{answer}}")


def test_no_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 document, not 0"):
        tasks.documents(0, 0)
