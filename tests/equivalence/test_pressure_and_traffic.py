from __future__ import annotations

from dataclasses import replace
from itertools import product

import msgspec
import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, KVEventBatch

from benchmarks.equivalence import compare, observe, outputs, ratios, traffic

SEEN = observe.Seen(3, 100, 50, 20, holds=9, harness_held=2, active=True)
SAMPLE = compare.Sample("p", ("x",), (), (), {})
RESULTS = compare.Results({("text", 0): SAMPLE}, {"text/acc": 0.0})


@pytest.mark.parametrize("absent", ["preemptions", "evicted_blocks", "holds", "harness_held"])
def test_pressure_that_did_not_happen_is_named(absent: str) -> None:
    assert observe.missing(SEEN, "saga") == []
    (line,) = observe.missing(replace(SEEN, **{absent: 0}), "saga")
    assert line.startswith("saga: no ")


def test_stock_holds_nothing_but_preempts_and_evicts() -> None:
    stock = observe.Seen(3, 100, 50, 20)
    assert observe.missing(stock, "stock") == []
    assert len(observe.missing(replace(stock, preemptions=0, evicted_blocks=0), "stock")) == 2


@pytest.mark.parametrize("change", [{"active": False}, {"policy_failures": 1}])
def test_a_saga_that_does_not_decide_proves_nothing(change: dict[str, object]) -> None:
    assert len(observe.missing(replace(SEEN, **change), "saga")) == 1


def test_evictions_are_the_blocks_that_vllm_tells_as_removed() -> None:
    events = [BlockRemoved([b"a", b"b"], "GPU"), AllBlocksCleared(), BlockRemoved([b"c"], "GPU")]
    batch = KVEventBatch(ts=1.0, events=events)
    assert observe.evictions(msgspec.msgpack.encode(batch)) == 3


def outcome(arm: outputs.Arm, results: compare.Results, seen: observe.Seen) -> outputs.Outcome:
    names = ("completions", "completions-session") if arm.pressed else ("completions",)
    return outputs.Outcome(arm, dict.fromkeys(names, results), seen, {}, 1.0)


def test_answers_and_pressure_of_every_arm_are_looked_at() -> None:
    alone, stock, saga = outputs.ARMS
    good = [outcome(alone, RESULTS, replace(SEEN, preemptions=0)), outcome(stock, RESULTS, SEEN)]
    assert outputs.problems([*good, outcome(saga, RESULTS, SEEN)]) == []
    other = compare.Results({("text", 0): replace(SAMPLE, texts=("y",))}, RESULTS.scores)
    wrong = outputs.problems([*good, outcome(saga, other, replace(SEEN, preemptions=0))])
    assert len(wrong) == 3 and wrong[0] == "saga: no preemptions"
    assert all(line.startswith("saga-pressed: completions") for line in wrong[1:])


def test_answers_that_do_not_depend_on_their_prompts_prove_nothing() -> None:
    alone, *pressed = (outcome(arm, RESULTS, SEEN) for arm in outputs.ARMS)
    assert outputs.problems([replace(alone, insensitive=0), *pressed]) == []
    (line,) = outputs.problems([replace(alone, insensitive=2), *pressed])
    assert line.startswith("2 answers do not depend")


def test_a_turn_repeats_what_was_said_and_others_are_between() -> None:
    rows = traffic.conversations(40, 0)
    assert rows == traffic.conversations(40, 0) != traffic.conversations(40, 1)
    prompts = [row["conversations"][0]["value"] for row in rows]
    followed = [
        next((j for j in range(i) if prompts[i].startswith(prompts[j])), None) for i in range(40)
    ]
    assert followed[:12] == [None] * 12
    assert followed[12:24] == list(range(12))
    assert max(map(len, prompts)) <= 1024


def test_every_arm_comes_first_as_often_as_any() -> None:
    firsts = [traffic.turn(number)[0] for number in range(6)]
    assert sorted(firsts) == sorted([*traffic.ARMS, *traffic.ARMS])


def cells(factor: float) -> list[traffic.Cell]:
    """Three rounds of two loads, in which saga's values are `factor` of stock's."""
    found = []
    for load, number, arm in product((0.5, 1.0), range(3), ("control", "saga", "stock")):
        value = load * (number + 1) * (factor if arm == "saga" else 1.0)
        values = dict.fromkeys(traffic.METRICS, value)
        found.append(traffic.Cell("single-turn", load, number, arm, values))
    return found


def test_saga_is_compared_within_its_round_and_load() -> None:
    found = traffic.compared(cells(1.1))
    assert list(found) == ["all", "single-turn, 50%", "single-turn, 100%"]
    for metrics in found.values():
        for each in metrics.values():
            assert each["saga"].mean == pytest.approx(1.1)
            assert each["control"].mean == pytest.approx(1.0)
    for each in found["all"].values():
        assert ratios.verdict(each["saga"], each["control"]) == "unequal"
