"""Stretches of pure decode, in which every step is known before it is scheduled.

While all running calls decode, none is let in and none ends, a scheduler's next step is its last
one with every context a token longer. Such a stretch is planned at once and scheduled afterwards,
when it is over or something happens in it: in one go, as if all its tokens but the first of each
call had been speculated and accepted, a path that vLLM's scheduler has. Blocks, evictions and times
come out as they would step by step.

Who was refused for lack of room at the last step is refused again while there is no more of it and
what it would find in the prefix cache is the same; so a stretch ends before a block is evicted that
the first of those who wait could use.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from vllm_saga.simulator.hardware import Batch, Hardware
from vllm_saga.simulator.lookups import Lookups

# Shorter stretches are not worth planning, longer ones are planned in pieces.
_SHORTEST, _LONGEST = 4, 64
# Held calls are let in by time, too: look that often.
_HELD_S = 0.2


class Cruise:
    """The ends, in seconds, of the `in_flight` steps that were scheduled and of those to come."""

    __slots__ = ("ends", "in_flight")

    def __init__(self, ends: list[float], in_flight: int) -> None:
        self.ends = ends
        self.in_flight = in_flight

    @property
    def due_s(self) -> float:
        return self.ends[-1]

    def finished_before(self, now: float) -> int:
        """How many of the steps ended before `now`."""
        return bisect_left(self.ends, now)


def plan(
    scheduler: Any,
    hardware: Hardware,
    in_flight: list[float],
    left: Mapping[str, int],
    refused: Lookups | None,
    until: float,
) -> Cruise | None:
    """The stretch that begins now, if there is one.

    in_flight: ends of the steps scheduled, seconds. left: output tokens that each running call
    still lacks when these are done. refused: what those who wait have found in the prefix cache, if
    none was let in by the last step and nothing has come or ended since. until: when one of them
    may be let in by the clock.
    """
    running = scheduler.running
    if not running or getattr(scheduler, "skipped_waiting", None):
        return None
    if len(running) != len(left):
        return None
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    count = min(
        min(left.values()) + 1,
        hardware.max_num_batched_tokens // len(running),
        (free // len(running) - 1) * hardware.block_size,
        _LONGEST,
    )
    if scheduler.waiting:
        if refused is None:
            return None
        count = min(count, len(in_flight) + _steps_without_effect(scheduler, refused))
    else:
        until = in_flight[0] + _HELD_S if len(scheduler.waiting) else math.inf
    if count < len(in_flight) + _SHORTEST:
        return None
    for request in running:
        if request.num_computed_tokens < request.num_tokens - 1 + request.num_output_placeholders:
            return None  # prefills
    sequences = len(running)
    kv = sum(request.num_computed_tokens for request in running)
    ends = list(in_flight)
    while len(ends) < count and ends[-1] < until:
        kv += sequences
        ends.append(ends[-1] + hardware.step_s(Batch(sequences, sequences, kv, kv)))
    return Cruise(ends, len(in_flight)) if len(ends) >= len(in_flight) + _SHORTEST else None


def _steps_without_effect(scheduler: Any, lookups: Lookups) -> int:
    """Steps before one that evicts a block which the first of those who wait has found."""
    size = scheduler.block_size
    room = []
    for request in scheduler.running:
        (blocks,) = scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
        room.append(len(blocks) * size - request.num_computed_tokens)
    # Steps before each of the next blocks is taken: every call needs one now, and one later.
    steps = sorted(left + more for left in room for more in (0, size))
    head = scheduler.waiting.peek_request()
    free = lookups.evictable_before(head.block_hashes, len(steps))
    return steps[free] if free < len(steps) else _LONGEST
