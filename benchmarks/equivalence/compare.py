"""Are two runs of the harness the same, sample by sample?

What is generated, whether a choice is the greedy one, and every score must be equal. Log
probabilities may differ by `TOLERANCE` nats: sums of the same float32 products in another order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Nats, of a whole continuation.
TOLERANCE = 1e-3

Key = tuple[str, int]
"""(task, document)."""


class NoSamples(RuntimeError):
    """The harness has left nothing that can be compared."""


@dataclass(frozen=True)
class Sample:
    """One document's prompts (their hash), answers, and scores.

    logprobs and greedy: of each choice of a multiple choice; texts: what was generated.
    """

    prompt: str
    texts: tuple[str, ...]
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    scores: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """A run: its samples, and the scores of its tasks as `task/metric`."""

    samples: Mapping[Key, Sample]
    scores: Mapping[str, float]


def read(folder: Path) -> Results:
    """What `lm_eval run --log_samples --output_path folder` has written.

    Raises:
        NoSamples: there are no samples, or no results.
    """
    samples: dict[Key, Sample] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        for line in path.read_text().splitlines():
            told = json.loads(line)
            samples[task, told["doc_id"]] = parse(told)
    scores = {
        f"{task}/{metric}": value
        for path in sorted(folder.rglob("results_*.json"))
        for task, values in json.loads(path.read_text())["results"].items()
        for metric, value in values.items()
        if isinstance(value, float)
    }
    if not samples or not scores:
        raise NoSamples(f"{folder}: the harness has left no samples and scores there")
    return Results(samples, scores)


def parse(told: Mapping[str, Any]) -> Sample:
    """One line of the harness' samples."""
    texts, logprobs, greedy = [], [], []
    for (response,) in told["resps"]:
        if isinstance(response, str):
            texts.append(response)
        else:
            logprobs.append(float(response[0]))
            greedy.append(str(response[1]) == "True")
    scores = {name: told[name] for name in told["metrics"]}
    return Sample(told["prompt_hash"], tuple(texts), tuple(logprobs), tuple(greedy), scores)


def differences(reference: Results, other: Results, tolerance: float = TOLERANCE) -> list[str]:
    """What is not the same, a line for each sample and score; empty if all is.

    Raises:
        NoSamples: there is nothing to compare.
    """
    if not reference.samples:
        raise NoSamples("the reference has no samples")
    found = []
    for key in sorted(reference.samples.keys() | other.samples.keys()):
        ours, theirs = reference.samples.get(key), other.samples.get(key)
        if ours is None or theirs is None:
            found.append(f"{_name(key)}: only one of the runs has it")
        else:
            found += [f"{_name(key)}: {what}" for what in _unlike(ours, theirs, tolerance)]
    for name in sorted(reference.scores.keys() | other.scores.keys()):
        before, after = reference.scores.get(name), other.scores.get(name)
        if before != after:
            found.append(f"score {name}: {before} -> {after}")
    return found


def largest_gap(reference: Results, other: Results) -> float:
    """Of the log probabilities of samples that both have, in nats; 0 if there are none."""
    both = reference.samples.keys() & other.samples.keys()
    pairs = (
        zip(reference.samples[key].logprobs, other.samples[key].logprobs, strict=False)
        for key in both
    )
    return max((abs(a - b) for pair in pairs for a, b in pair), default=0.0)


def _unlike(ours: Sample, theirs: Sample, tolerance: float) -> Iterator[str]:
    if ours.prompt != theirs.prompt:
        yield "another prompt"
        return
    if ours.texts != theirs.texts:
        yield f"{list(ours.texts)} -> {list(theirs.texts)}"
    if ours.greedy != theirs.greedy:
        yield f"greedy {list(ours.greedy)} -> {list(theirs.greedy)}"
    near = len(ours.logprobs) == len(theirs.logprobs) and all(
        abs(a - b) <= tolerance for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)
    )
    if not near:
        yield f"log probabilities {list(ours.logprobs)} -> {list(theirs.logprobs)}"
    if ours.scores != theirs.scores:
        yield f"scores {dict(ours.scores)} -> {dict(theirs.scores)}"


def _name(key: Key) -> str:
    return f"{key[0]} {key[1]}"
