"""What one engine step costs on given hardware.

A step of a transformer runs two kinds of kernels one after the other, and the two scale
differently, so their times add up:

* matrix products: read the weights once, multiply them with every new token. Whichever of reading
  and multiplying takes longer hides the other (roofline: Williams et al., CACM 2009).
* attention: reads the KV of every context and multiplies per (new token, context token) pair.
  Prefill and decode attention do not overlap in today's kernels (POD-Attention, ASPLOS 2025), so
  these add up too.

One `max` over everything would be wrong by a third: 48 sequences of 3,072 tokens of Qwen3-8B take
14.6 ms a step on an H100, of which neither part alone explains more than 8. The tests hold this
form against published measurements.

Pure: no vLLM, no torch, no clock. Lengths are in tokens, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

#: What a number may be: whatever is made of two or three of them is a finite number then.
_RANGE = (1e-30, 1e30)


class HardwareError(ValueError):
    """A hardware description that cannot be used; the message names the field, or the file."""


class Batch(NamedTuple):
    """What one engine step computes.

    new_tokens: tokens scheduled, over all requests. sequences: requests scheduled.
    attention_pairs: sum over requests of new tokens x mean context each of them attends to.
    kv_tokens: sum over requests of context tokens whose KV is read, the new ones included.
    """

    new_tokens: int
    sequences: int
    attention_pairs: int
    kv_tokens: int

    @classmethod
    def of(cls, requests: Iterable[tuple[int, int]]) -> Batch:
        """The batch of requests given as (new tokens, tokens of context before them)."""
        new = sequences = pairs = kv = 0
        for count, before in requests:
            new += count
            sequences += 1
            pairs += count * before + count * (count + 1) // 2
            kv += before + count
        return cls(new, sequences, pairs, kv)


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The experts of a mixture-of-experts model: `active` of `total` per token, `bytes` in all.

    A step reads an expert once if any of its tokens wants it. With B tokens choosing evenly that
    is a share of 1 - (1 - active/total)^B; real routing is less even and reads somewhat less.
    """

    total: int
    active: int
    bytes: float

    def __post_init__(self) -> None:
        _check_numbers(self, zero=())
        if self.active > self.total:
            raise HardwareError(f"active: {self.active} exceeds total, {self.total}")

    def read_bytes(self, new_tokens: int) -> float:
        return self.bytes * (1 - (1 - self.active / self.total) ** new_tokens)


class Roofline(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True,
    tag_field="kind", tag="roofline",
):  # fmt: skip
    """Step time from the model's shape and the data sheet of its GPUs, all GPUs taken together.

    weight_bytes: weights every step reads, experts excluded. flops_per_token: matrix products of
    one token. flops_per_pair: attention of one new token to one context token. bandwidth
    (bytes/s) and peak_flops (1/s): data sheet; the efficiencies, within (0, 1], are the shares of
    them that memory reads, matrix products and attention reach. overhead_s and sequence_s: host
    work, small kernels and communication per step, and per sequence in it.
    """

    weight_bytes: float
    kv_bytes_per_token: float
    flops_per_token: float
    flops_per_pair: float
    bandwidth: float
    peak_flops: float
    memory_efficiency: float
    compute_efficiency: float
    attention_efficiency: float
    overhead_s: float
    sequence_s: float = 0.0
    experts: Experts | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, zero=("overhead_s", "sequence_s"))
        for name in ("memory_efficiency", "compute_efficiency", "attention_efficiency"):
            if getattr(self, name) > 1:
                raise HardwareError(f"{name}: {getattr(self, name)} is more than 1")

    def step_s(self, batch: Batch) -> float:
        weights = self.weight_bytes
        if self.experts:
            weights += self.experts.read_bytes(batch.new_tokens)
        reading = self.bandwidth * self.memory_efficiency
        multiplying = self.peak_flops * self.compute_efficiency
        attending = self.peak_flops * self.attention_efficiency
        products = max(weights / reading, self.flops_per_token * batch.new_tokens / multiplying)
        attention = self.kv_bytes_per_token * batch.kv_tokens / reading
        attention += self.flops_per_pair * batch.attention_pairs / attending
        return self.overhead_s + self.sequence_s * batch.sequences + products + attention


class Linear(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True,
    tag_field="kind", tag="linear",
):  # fmt: skip
    """Step time from measured coefficients, in seconds: what `calibrate` fits.

    step_s = base_s + token_s x max(new tokens, free_tokens) + sequence_s x sequences
    + pair_s x attention pairs + kv_token_s x KV tokens

    `free_tokens` is the roofline's corner: so many tokens cost no more than one, because reading
    the weights takes longer than multiplying with them. 0 makes the form linear.
    """

    base_s: float
    token_s: float
    sequence_s: float = 0.0
    pair_s: float = 0.0
    kv_token_s: float = 0.0
    free_tokens: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, zero=self.__struct_fields__)
        if not self.base_s + self.token_s > 0:
            raise HardwareError("base_s, token_s: one of them must be positive")

    def step_s(self, batch: Batch) -> float:
        return (
            self.base_s
            + self.token_s * max(batch.new_tokens, self.free_tokens)
            + self.sequence_s * batch.sequences
            + self.pair_s * batch.attention_pairs
            + self.kv_token_s * batch.kv_tokens
        )


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: its KV pool, vLLM's limits on a step, and what a step costs.

    source: where the figures come from. kv_tokens: KV pool in tokens.
    max_num_seqs, max_num_batched_tokens: vLLM's options of that name. request_s: seconds a call
    spends outside the engine (HTTP, tokenizer, processes); contention_s: so much more for each
    other call in flight. The presets leave both out.
    """

    name: str
    source: str
    kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cost: Roofline | Linear
    block_size: int = 16
    request_s: float = 0.0
    contention_s: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, zero=("request_s", "contention_s"))
        if self.kv_tokens < self.block_size:
            raise HardwareError(
                f"kv_tokens: {self.kv_tokens} is less than one block of {self.block_size}"
            )

    def step_s(self, batch: Batch) -> float:
        """Seconds one step takes that computes `batch`."""
        return self.cost.step_s(batch)


def call_alone_s(
    hardware: Hardware, new_tokens: int, context_before: int, output_tokens: int
) -> float:
    """Seconds one call takes alone on an idle engine, from its issue to its last token.

    Its first `context_before` prompt tokens are in the prefix cache, `new_tokens` are not; vLLM
    computes at least the last prompt token again. Prefill goes in chunks of
    `max_num_batched_tokens`; the last chunk yields the first of `output_tokens` (at least 1).
    """
    if new_tokens < 0 or context_before < 0 or output_tokens < 1:
        raise ValueError(
            f"a call of {new_tokens} new tokens after {context_before} with {output_tokens} output"
        )
    prompt = max(new_tokens + context_before, 1)
    computed = min(context_before, prompt - 1)
    seconds = hardware.request_s
    while computed < prompt:
        chunk = min(prompt - computed, hardware.max_num_batched_tokens)
        seconds += hardware.step_s(Batch.of([(chunk, computed)]))
        computed += chunk
    steps = output_tokens - 1
    if steps:
        # Decode of one sequence costs the same from step to step but for its context, and that
        # enters linearly: the mean step is the mean of the first and the last.
        first = hardware.step_s(Batch.of([(1, prompt)]))
        last = hardware.step_s(Batch.of([(1, prompt + steps - 1)]))
        seconds += steps * (first + last) / 2
    return seconds


def _check_numbers(struct: msgspec.Struct, zero: Iterable[str]) -> None:
    """Every number of `struct` is finite, and within `_RANGE` (or 0, for the fields in `zero`)."""
    least, most = _RANGE
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if name in ("name", "source") or isinstance(value, msgspec.Struct | None):
            continue
        # Not of integers, which may be too large for a float, and too long for a message.
        if not isinstance(value, int) and not (isinstance(value, float) and math.isfinite(value)):
            raise HardwareError(f"{name}: {value!r} is not a finite number")
        if abs(value) > most:
            raise HardwareError(f"{name}: must be at most {most:g}")
        if value < 0 or (value == 0 and name not in zero):
            allowed = "at least 0" if name in zero else "positive"
            raise HardwareError(f"{name}: {value} must be {allowed}")
        if 0 < value < least:
            raise HardwareError(f"{name}: {value} must be at least {least:g}")
