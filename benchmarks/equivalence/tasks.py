"""Tasks for lm-evaluation-harness, made here: long prompts with a common beginning, as agents send.

Same seed, same bytes. The model's weights are random, so that scores mean nothing by themselves;
what matters is that each depends on what was computed, and that every prompt is new.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CHOICE, TEXT, CHAT = "saga_choice", "saga_text", "saga_chat"
#: Of a generated answer: enough that many answers at once outgrow a small pool.
ANSWER_TOKENS = 160
_CHOICES = 4
_EXAMPLES = 3
# fmt: off
_WORDS = (
    "agent", "file", "test", "edit", "code", "tool", "result", "error", "output", "command",
    "function", "argument", "class", "import", "return", "value", "index", "cache", "block",
    "token", "queue", "worker", "branch", "commit", "patch", "merge", "build", "deploy",
    "config", "server", "client", "request", "answer", "header", "session", "user",
)
# fmt: on

Doc = dict[str, Any]


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choice(_WORDS) for _ in range(count))


def _transcript(source: random.Random, turns: int) -> str:
    roles = ("user", "assistant", "tool")
    lines = (f"{roles[turn % 3]}: {_words(source, 12)}" for turn in range(turns))
    return "\n".join(lines)


def documents(count: int, seed: int) -> dict[str, list[Doc]]:
    """`count` documents of each task, and the examples of CHAT under `examples`.

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"a task needs at least 1 document, not {count}")
    source = random.Random(f"equivalence-{seed}")
    common = _transcript(source, 12)

    def prompt() -> str:
        own = _transcript(source, source.randrange(3, 10))
        return f"{common}\n{own}\nassistant:"

    choice = [
        {
            "prompt": prompt(),
            "choices": [_words(source, source.randrange(2, 6)) for _ in range(_CHOICES)],
            "answer": source.randrange(_CHOICES),
        }
        for _ in range(count)
    ]
    text = [{"prompt": prompt(), "answer": _words(source, 12)} for _ in range(count)]
    turns = [
        {"prompt": _transcript(source, source.randrange(3, 8)), "answer": _words(source, 16)}
        for _ in range(count + _EXAMPLES)
    ]
    return {
        CHOICE: choice, TEXT: text, CHAT: turns[_EXAMPLES:], "examples": turns[:_EXAMPLES]
    }  # fmt: skip


def write(folder: Path, count: int, seed: int) -> Path:
    """Documents and task files, for the harness' --include_path."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, docs in documents(count, seed).items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in _tasks(files).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder


def _tasks(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    common = {"doc_to_text": "{{prompt}}", "target_delimiter": " ", "num_fewshot": 0}
    generated = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["\n\nuser:"], "do_sample": False, "temperature": 0.0,
            "max_gen_toks": ANSWER_TOKENS, "ignore_eos": True,
        },
        # Of random text hardly any is an exact match; its likeness to the target still differs.
        "metric_list": _metrics("exact_match", "chrf"),
    }  # fmt: skip
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": _metrics("acc", "acc_norm"),
    }
    examples = {
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": _EXAMPLES,
    }
    chat_files = {"test": str(files[CHAT]), "train": str(files["examples"])}
    return {
        CHOICE: {"task": CHOICE, **_data({"test": str(files[CHOICE])}), **common, **choice},
        TEXT: {"task": TEXT, **_data({"test": str(files[TEXT])}), **common, **generated},
        CHAT: {"task": CHAT, **_data(chat_files), **common, **generated, **examples},
    }


def _data(files: dict[str, str]) -> dict[str, Any]:
    kwargs = {"data_files": files}
    return {"dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}


def _metrics(*names: str) -> Sequence[dict[str, Any]]:
    joined = {name: "chrf" if name == "chrf" else "mean" for name in names}
    return [
        {"metric": name, "aggregation": how, "higher_is_better": True}
        for name, how in joined.items()
    ]
