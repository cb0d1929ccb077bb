"""The hardware we know, by name, and hardware that is described in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from vllm_saga.policy.undecodable import UNDECODABLE
from vllm_saga.simulator.hardware import Experts, Hardware, HardwareError, Roofline


class Gpus(NamedTuple):
    """All GPUs of one engine: data sheet in bytes/s and dense bf16 operations/s, shares reached."""

    bandwidth: float
    peak_flops: float
    memory_efficiency: float
    compute_efficiency: float


# Data sheets: NVIDIA A100 80GB SXM, H100 SXM, H200 SXM. The shares are explained in `source`.
A100_X4 = Gpus(4 * 2.039e12, 4 * 312e12, 0.74, 0.58)
H100 = Gpus(3.35e12, 989e12, 0.85, 0.55)
H200 = Gpus(4.8e12, 989e12, 0.85, 0.55)

#: 12.8 ms with 256 sequences, 6.8 ms with one, less KV and arithmetic (Qwen3-8B, H100).
_SEQUENCE_S = 10e-6


def dense_roofline(
    gpus: Gpus,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    overhead_s: float,
    head: int = 128,
) -> Roofline:
    """A Llama-shaped model in 16 bits: the names are those of its config.json.

    Of the embeddings a step reads a few rows only; of the output head it reads all, but multiplies
    for the last token of each sequence only, which is left out of the arithmetic.
    """
    layer = hidden * (2 * heads + 2 * kv_heads) * head + 3 * hidden * intermediate
    return Roofline(
        weight_bytes=2 * (layers * layer + vocabulary * hidden),
        kv_bytes_per_token=2 * 2 * layers * kv_heads * head,
        flops_per_token=2 * layers * layer,
        flops_per_pair=4 * layers * heads * head,
        bandwidth=gpus.bandwidth,
        peak_flops=gpus.peak_flops,
        memory_efficiency=gpus.memory_efficiency,
        compute_efficiency=gpus.compute_efficiency,
        attention_efficiency=gpus.compute_efficiency,
        overhead_s=overhead_s,
        sequence_s=_SEQUENCE_S,
    )


def _llama3_8b(name: str, gpus: Gpus, kv_tokens: int, memory: str) -> Hardware:
    cost = dense_roofline(
        gpus, layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256,
        overhead_s=1.25e-3,
    )  # fmt: skip
    return Hardware(
        name=name,
        source=(
            "Llama-3-8B config.json, bf16: 7.5e9 parameters read per step (15.0 GB), 13.96e9 "
            "operations per token, 131,072 B of KV per token; NVIDIA data sheet. Efficiencies "
            "0.85 (memory) and 0.55 (compute) and overheads fit what silybench-data publishes for "
            "Qwen3-8B bf16 on an H100 with vLLM 0.30; with them one sequence decodes in 6.5 ms on "
            f"an H100 (6.48 ms published by InferenceBench for vLLM 0.21). KV: {memory}, less 16.1 "
            "GB of weights and 4.5 GB of activations and graphs (what those runs leave)."
        ),
        kv_tokens=kv_tokens,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
        cost=cost,
    )


_LLAMA3_70B = dense_roofline(
    A100_X4, layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=28672, vocabulary=128256,
    overhead_s=4.5e-3,
)  # fmt: skip
_LLAMA3_70B_4XA100 = Hardware(
    name="llama3-70b-4xa100",
    source=(
        "Llama-3-70B config.json, fp16, tensor parallel 4: 69.5e9 parameters read per step (139 "
        "GB), 136.9e9 operations per token, 327,680 B of KV per token; NVIDIA data sheet. Vidur's "
        "kernel profiles (A100, TP4) give 0.285 ms of matrix products a layer for one token, 0.74 "
        "of the bandwidth, and 8.2 ms a layer with norms for 4,096 tokens; all-reduce added, 0.58 "
        "of the peak. Overhead: norms, rotary embedding, two all-reduces in each of 80 layers. "
        "KV pool: 450,000 tokens, the worker of the SAGA paper (arXiv 2605.00528)."
    ),
    kv_tokens=450_000,
    # `vllm serve` defaults on an A100; 1024 and 8192 on H100 and H200 (vLLM 0.32).
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    cost=_LLAMA3_70B,
)

# Qwen3-30B-A3B: 48 layers, hidden 2048, 32 heads and 4 KV heads of 128, 128 experts of 768, 8 of
# them active. FP8 because 16-bit weights (61 GB) leave a KV pool of only 11 GB on one H100.
_ATTENTION = 48 * 2048 * (2 * 32 + 2 * 4) * 128
_ROUTER = 48 * 2048 * 128
_EXPERTS = 48 * 128 * 3 * 2048 * 768
_HEAD = 151936 * 2048

_QWEN3_30B_A3B_H100 = Hardware(
    name="qwen3-30b-a3b-h100",
    source=(
        "Qwen3-30B-A3B-FP8 config.json: FP8 weights, 29.0 GB of them experts (8 of 128 per token); "
        "output head and router in bf16; 5.46e9 operations per token, 98,304 B of KV (bf16) per "
        "token; NVIDIA data sheet (H100 SXM, FP8). Small kernels decide: its 80B sister, also 3B "
        "active in 48 layers, decodes 210.8 tokens/s alone on an H200 (Millstone AI), hence an "
        "overhead of 3.8 ms. Compute efficiency 0.17: 62,000 tokens/s before attention, against "
        "45,000-56,000 measured in all on an H200 for Qwen3.5-35B-A3B-FP8 (GPUStack). Attention "
        "runs in bf16, at half the FP8 peak: 0.275. KV: 0.9 x 85.0 GB, less 31.2 GB of weights "
        "and 4.5 GB of activations and graphs."
    ),
    # (0.9 x 85.0e9 - 31.2e9 - 4.5e9) / 98,304 = 415,000
    kv_tokens=414_000,
    max_num_seqs=1024,
    max_num_batched_tokens=8192,
    cost=Roofline(
        weight_bytes=_ATTENTION + 2 * _ROUTER + 2 * _HEAD,
        experts=Experts(128, 8, _EXPERTS),
        kv_bytes_per_token=2 * 2 * 48 * 4 * 128,
        flops_per_token=2 * (_ATTENTION + _ROUTER + _EXPERTS * 8 / 128),
        flops_per_pair=4 * 48 * 32 * 128,
        bandwidth=H100.bandwidth,
        peak_flops=1979e12,
        memory_efficiency=H100.memory_efficiency,
        compute_efficiency=0.17,
        attention_efficiency=0.275,
        overhead_s=3.8e-3,
        sequence_s=_SEQUENCE_S,
    ),
)

_ALL = (
    _LLAMA3_70B_4XA100,
    # (0.9 x 85.0e9 - 16.1e9 - 4.5e9) / 131,072 = 426,500
    _llama3_8b("llama3-8b-h100", H100, 426_000, "0.9 x 85.0 GB"),
    # (0.9 x 150.1e9 - 16.1e9 - 4.5e9) / 131,072 = 873,500
    _llama3_8b("llama3-8b-h200", H200, 873_008, "0.9 x 150.1 GB"),
    _QWEN3_30B_A3B_H100,
)
PRESETS: Mapping[str, Hardware] = MappingProxyType({preset.name: preset for preset in _ALL})


def load(name_or_path: str | Path, kv_tokens: int | None = None) -> Hardware:
    """A preset by name, or the hardware in a `.json` file; HardwareError otherwise.

    kv_tokens: its KV pool, if it is not to be what the preset or the file says.
    """
    found = PRESETS.get(str(name_or_path)) or _read(Path(name_or_path))
    return msgspec.structs.replace(found, kv_tokens=kv_tokens) if kv_tokens else found


def _read(path: Path) -> Hardware:
    if path.suffix != ".json":
        raise HardwareError(
            f"unknown hardware {str(path)!r}: one of {', '.join(PRESETS)}, or a .json file"
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=Hardware)
    except OSError as error:
        raise HardwareError(f"{path}: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise HardwareError(f"{path}: {_readable(str(error))}") from None
    except UNDECODABLE as error:
        raise HardwareError(f"{path}: not JSON: {error}") from None


def _readable(message: str) -> str:
    """`msg - at `$.cost.base_s`` -> `cost.base_s: msg`."""
    text, _, place = message.partition(" - at `$.")
    return f"{place.rstrip('`')}: {text}" if place else text
