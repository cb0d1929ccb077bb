"""Step cost models: their shape, the presets' figures, and how bad input is refused."""

import math
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.simulator import presets
from vllm_saga.simulator.hardware import (
    Batch,
    Experts,
    Hardware,
    HardwareError,
    Linear,
    Roofline,
    call_alone_s,
)

LINEAR = Hardware(
    name="measured",
    source="test",
    kv_tokens=10_000,
    max_num_seqs=8,
    max_num_batched_tokens=100,
    cost=Linear(
        base_s=1e-3, token_s=1e-5, sequence_s=1e-5, pair_s=1e-9, kv_token_s=1e-8, free_tokens=30
    ),
)
KNOWN = [*presets.PRESETS.values(), LINEAR]

requests = st.lists(
    st.tuples(st.integers(1, 5_000), st.integers(0, 100_000)), min_size=1, max_size=20
)


def roofline(**changes: object) -> Roofline:
    cost = presets.PRESETS["qwen3-30b-a3b-h100"].cost
    assert isinstance(cost, Roofline)
    return msgspec.structs.replace(cost, **changes)


# -- form -------------------------------------------------------------------------------------


@given(st.sampled_from(KNOWN), requests, st.sampled_from(Batch._fields), st.integers(1, 10**6))
def test_more_work_never_takes_less_time(
    machine: Hardware, batch: list[tuple[int, int]], field: str, more: int
) -> None:
    before = Batch.of(batch)
    after = before._replace(**{field: getattr(before, field) + more})
    assert 0 < machine.step_s(before) <= machine.step_s(after) < math.inf


@given(requests)
def test_a_batch_counts_each_pair_once(batch: list[tuple[int, int]]) -> None:
    pairs = sum(sum(range(before + 1, before + new + 1)) for new, before in batch[:3])
    assert Batch.of(batch[:3]).attention_pairs == pairs
    assert Batch.of(batch) == tuple(map(sum, zip(*(Batch.of([one]) for one in batch), strict=True)))


@given(st.sampled_from(KNOWN), st.integers(0, 30_000), st.integers(0, 60_000), st.integers(1, 300))
def test_a_call_alone_takes_the_sum_of_its_steps(
    machine: Hardware, new: int, before: int, output: int
) -> None:
    prompt = max(new + before, 1)
    computed, made, seconds = min(before, prompt - 1), 0, 0.0
    while made < output:
        count = min(prompt - computed, machine.max_num_batched_tokens) if not made else 1
        seconds += machine.step_s(Batch(count, 1, _pairs(count, computed), computed + count))
        computed += count
        made += computed >= prompt
    assert call_alone_s(machine, new, before, output) == pytest.approx(seconds, rel=1e-9)


def _pairs(new: int, before: int) -> int:
    return sum(range(before + 1, before + new + 1))


def test_a_call_alone_is_quick_to_price() -> None:
    machine = presets.load("llama3-70b-4xa100")
    best = min(_seconds(lambda: call_alone_s(machine, 8_000, 50_000, 2_000)) for _ in range(5))
    assert best < 1e-3


def _seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@pytest.mark.parametrize("call", [(-1, 0, 1), (1, -1, 1), (1, 1, 0)])
def test_an_impossible_call_is_refused(call: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a call of"):
        call_alone_s(LINEAR, *call)


def test_free_tokens_are_free_and_others_are_not() -> None:
    times = [LINEAR.step_s(Batch(new, 1, 0, 0)) for new in (1, 30, 31, 130)]
    assert times[0] == times[1]
    assert times[2] - times[1] == pytest.approx(1e-5)
    assert times[3] - times[1] == pytest.approx(1e-3)


def test_a_step_reads_the_experts_its_tokens_want() -> None:
    experts = Experts(total=128, active=8, bytes=128.0)
    assert experts.read_bytes(1) == pytest.approx(8)
    assert experts.read_bytes(2) == pytest.approx(15.5)
    assert experts.read_bytes(1000) == pytest.approx(128)


# -- against measurements ---------------------------------------------------------------------

# Qwen3-8B, bf16, one H100 SXM, vLLM 0.30 (tgarg01/silybench-data, derived/csv/perf_points.csv,
# run 20260924T125045Z): median inter-token latency in ms of so many sequences of so much context
# (prompt + half the output); only points at which prompts rarely interrupt decoding.
DECODE_MS = [
    (1, 192, 6.83), (4, 192, 6.92), (16, 192, 7.14), (32, 192, 7.40), (64, 192, 8.15),
    (128, 192, 9.34), (256, 192, 12.83),
    (1, 3072, 7.00), (4, 3072, 7.53), (16, 3072, 9.46), (32, 3072, 11.87), (48, 3072, 14.57),
    (64, 3072, 17.05),
    (1, 8448, 7.30), (4, 8448, 8.62), (7, 8448, 10.18), (10, 8448, 11.78),
]  # fmt: skip
# 95th percentile of the time to first token in ms, less that of a prompt of 128 tokens (14.2 ms),
# which is mostly HTTP and tokenizer.
PREFILL_MS = [(1024, 34.3 - 14.2), (2048, 61.3 - 14.2), (8192, 253.9 - 14.2)]

QWEN3_8B = presets.dense_roofline(
    presets.H100, layers=36, hidden=4096, heads=32, kv_heads=8, intermediate=12288,
    vocabulary=151936, overhead_s=1.4e-3,
)  # fmt: skip


@pytest.mark.parametrize(("sequences", "context", "measured"), DECODE_MS)
def test_the_roofline_explains_published_decode_times(
    sequences: int, context: int, measured: float
) -> None:
    step_s = QWEN3_8B.step_s(Batch.of([(1, context - 1)] * sequences))
    assert 1000 * step_s == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(("prompt", "measured"), PREFILL_MS)
def test_the_roofline_explains_published_prefill_times(prompt: int, measured: float) -> None:
    step_s, short_s = (QWEN3_8B.step_s(Batch.of([(size, 0)])) for size in (prompt, 128))
    assert 1000 * (step_s - short_s) == pytest.approx(measured, rel=0.08)


# -- presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "decode_ms", "prefill_per_s", "kv_bytes", "seqs", "batched"),
    [
        ("llama3-70b-4xa100", (22, 30), (4_000, 5_500), 327_680, 256, 2048),
        ("llama3-8b-h100", (6.2, 6.9), (32_000, 40_000), 131_072, 1024, 8192),
        ("llama3-8b-h200", (4.5, 5.4), (32_000, 40_000), 131_072, 1024, 8192),
        ("qwen3-30b-a3b-h100", (4.4, 5.6), (40_000, 60_000), 98_304, 1024, 8192),
    ],
)
def test_anchors(
    name: str,
    decode_ms: tuple[float, float],
    prefill_per_s: tuple[float, float],
    kv_bytes: int,
    seqs: int,
    batched: int,
) -> None:
    machine = presets.load(name)
    assert isinstance(machine.cost, Roofline)
    assert decode_ms[0] <= 1000 * machine.step_s(Batch.of([(1, 500)])) <= decode_ms[1]
    assert prefill_per_s[0] <= 2048 / call_alone_s(machine, 2048, 0, 1) <= prefill_per_s[1]
    assert machine.cost.kv_bytes_per_token == kv_bytes
    assert (machine.max_num_seqs, machine.max_num_batched_tokens) == (seqs, batched)


def test_presets_fill_their_pool_with_whole_blocks() -> None:
    assert presets.load("llama3-70b-4xa100").kv_tokens == 450_000
    for name, machine in presets.PRESETS.items():
        assert machine.name == name
        assert machine.kv_tokens % machine.block_size == 0
        assert machine.source


def test_weights_and_kv_fit_the_memory() -> None:
    """The pool is what 0.9 of the memory leaves, after weights and at least 4 GB of other use."""
    embeddings = {"llama3-70b-4xa100": 2.1e9, "llama3-8b-h100": 1.05e9, "llama3-8b-h200": 1.05e9,
                  "qwen3-30b-a3b-h100": 0.62e9}  # fmt: skip
    memory = {"llama3-70b-4xa100": 4 * 85.0e9, "llama3-8b-h100": 85.0e9, "llama3-8b-h200": 150.1e9,
              "qwen3-30b-a3b-h100": 85.0e9}  # fmt: skip
    for name, machine in presets.PRESETS.items():
        cost = machine.cost
        assert isinstance(cost, Roofline)
        weights = cost.weight_bytes + embeddings[name] + (cost.experts.bytes if cost.experts else 0)
        used = weights + cost.kv_bytes_per_token * machine.kv_tokens + 4e9
        assert used < 0.9 * memory[name]


def test_long_contexts_cost_what_they_should_on_the_papers_worker() -> None:
    machine = presets.load("llama3-70b-4xa100")
    # A miss of 32k tokens takes seconds, its hit with 300 new tokens a fraction of one.
    assert 6 < call_alone_s(machine, 32_000, 0, 1) < 10
    assert 0.05 < call_alone_s(machine, 300, 31_700, 1) < 0.3


# -- reading and refusing ---------------------------------------------------------------------


@pytest.mark.parametrize("machine", KNOWN, ids=lambda machine: machine.name)
def test_json_round_trip(machine: Hardware, tmp_path) -> None:
    file = tmp_path / "machine.json"
    file.write_bytes(msgspec.json.encode(machine))
    assert presets.load(file) == presets.load(str(file)) == machine


def test_another_pool_is_one_replacement_away() -> None:
    smaller = msgspec.structs.replace(presets.load("llama3-8b-h100"), kv_tokens=32_000)
    assert smaller.kv_tokens == 32_000
    with pytest.raises(HardwareError, match="kv_tokens: 15 is less than one block of 16"):
        msgspec.structs.replace(smaller, kv_tokens=15)


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(HardwareError) as error:
        presets.load("abacus")
    assert "'abacus'" in str(error.value)
    for name in presets.PRESETS:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kv_tokens": "many"}, "kv_tokens: Expected `int`, got `str`"),
        ({"kv_tokens": 0}, "kv_tokens: 0 must be positive"),
        ({"colour": "blue"}, "unknown field `colour`"),
        (
            {"cost": {"kind": "linear", "token_s": 1}},
            "cost: Object missing required field `base_s`",
        ),
        ({"cost": {"kind": "linear", "base_s": 1, "token_s": -1}}, "cost: token_s: -1.0 must be"),
        ({"cost": {"kind": "oracle"}}, "cost.kind: Invalid value 'oracle'"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_field(
    change: dict[str, object], complaint: str, tmp_path
) -> None:
    file = tmp_path / "machine.json"
    file.write_bytes(msgspec.json.encode({**msgspec.to_builtins(LINEAR), **change}))
    with pytest.raises(HardwareError) as error:
        presets.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert complaint in str(error.value)


def test_a_file_that_is_no_json_or_is_not_there(tmp_path) -> None:
    file = tmp_path / "machine.json"
    with pytest.raises(HardwareError, match="No such file"):
        presets.load(file)
    file.write_text("{")
    with pytest.raises(HardwareError, match="not JSON"):
        presets.load(file)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bandwidth": 0.0}, "bandwidth: 0.0 must be positive"),
        ({"peak_flops": math.inf}, "peak_flops: inf is not a finite number"),
        ({"peak_flops": 10**400}, "peak_flops: must be at most 1e+30"),
        ({"bandwidth": 1e-300}, "bandwidth: 1e-300 must be at least 1e-30"),
        ({"flops_per_pair": math.nan}, "flops_per_pair: nan is not a finite number"),
        ({"overhead_s": -1e-3}, "overhead_s: -0.001 must be at least 0"),
        ({"memory_efficiency": 1.2}, "memory_efficiency: 1.2 is more than 1"),
        ({"weight_bytes": "heavy"}, "'heavy'"),
    ],
)
def test_a_bad_number_is_refused_by_field(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(HardwareError) as error:
        roofline(**change)
    assert complaint in str(error.value)


def test_no_step_is_free_and_no_token_wants_more_experts_than_there_are() -> None:
    with pytest.raises(HardwareError, match="base_s, token_s: one of them must be positive"):
        Linear(base_s=0, token_s=0, sequence_s=1)
    with pytest.raises(HardwareError, match="active: 9 exceeds total, 8"):
        Experts(total=8, active=9, bytes=1.0)
