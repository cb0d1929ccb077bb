"""Steps that prefill no more than they should, by limits that vLLM has itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_saga.policy.saga import SagaPolicy


class Pacer:
    """Sets vLLM's limits on a step's tokens for the length of one `schedule()`.

    vllm/v1/core/sched/scheduler.py: `max_num_scheduled_tokens` limits the step, and
    `long_prefill_token_threshold` what one call computes in it, so that who is scheduled first
    leaves room for those who decode. Never more than the operator's own limits.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        config = scheduler.scheduler_config
        # Where vLLM has a limit of its own kind in force, or cannot split a prompt anywhere.
        self.able = (
            isinstance(getattr(scheduler, "max_num_scheduled_tokens", None), int)
            and hasattr(config, "long_prefill_token_threshold")
            and getattr(config, "enable_chunked_prefill", False)
            and not getattr(scheduler, "adaptive_long_prefill_threshold", False)
            and not getattr(scheduler, "has_mamba_layers", False)
            and not getattr(scheduler, "max_num_encoder_input_tokens", 0)
        )

    def limits(self, saga: SagaPolicy) -> tuple[int, int] | None:
        """The tokens of the next step, and of one prefill in it; None = vLLM's own limits."""
        if not self.able or not saga.paces():
            return None
        decode_tokens = decoding = prefilling = 0
        for request in self._scheduler.running:
            left = _left(request)
            if _decodes(request, left):
                decoding += 1
                decode_tokens += max(left, 0)
            else:
                prefilling += 1
        prefilling += self._scheduler.waiting.ready
        tokens = saga.prefill_tokens(decode_tokens, decoding, prefilling)
        if tokens is None:
            return None
        # Two at a time: a short prefill does not wait for the end of a long one.
        return decode_tokens + tokens, tokens if prefilling == 1 else (tokens + 1) // 2

    def shortest_first(self) -> None:
        """Of the prefills that run, the one with the least left goes first."""
        self._scheduler.running.sort(key=_order)

    @contextmanager
    def within(self, limits: tuple[int, int] | None) -> Iterator[None]:
        """The limits are in force within, and as they were after it."""
        if limits is None:
            yield
            return
        scheduler, config = self._scheduler, self._scheduler.scheduler_config
        before = scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold
        tokens, share = limits
        scheduler.max_num_scheduled_tokens = min(tokens, before[0])
        config.long_prefill_token_threshold = min(share, before[1] or share)
        try:
            yield
        finally:
            scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold = before


def _left(request: Any) -> int:
    """Tokens of a running request that the next step could compute."""
    known: int = request.num_tokens_with_spec + request.num_output_placeholders
    return known - int(request.num_computed_tokens)


def _decodes(request: Any, left: int) -> bool:
    # A decode step computes the last token made, and those guessed after it.
    return left <= 1 + len(request.spec_token_ids)


def _order(request: Any) -> int:
    left = _left(request)
    return 0 if _decodes(request, left) else left
