"""How much a step prefills beside its decodes."""

from __future__ import annotations

from vllm_saga.policy.stepfit import StepFit

# Prefills get at least so large a part of what a step computes for nothing.
_LEAST = 0.25


def prefill_tokens(fit: StepFit, decode_tokens: int, decoding: int, prefilling: int) -> int | None:
    """How many tokens the next step should prefill; None = as many as it can.

    As many as it computes for nothing: fewer, and the engine has time to spare; more, and every
    call that decodes waits for them. Without such a limit a context that is computed again stops
    all others for its whole prefill. What it costs is that prefills go slower than they could, by
    a third or so. So it ends where that third, times those who wait for a prefill, exceeds those
    who decode.

    decode_tokens: that the step has to compute for the calls that decode. decoding, prefilling:
    calls of each kind; among the latter those that wait to begin.
    """
    free = fit.free_tokens
    if not free or not decoding or not prefilling:
        return None
    tokens = max(free - decode_tokens, int(_LEAST * free), 1)
    faster = fit.decode_s / (fit.token_s * tokens) - 1.0
    return None if prefilling * faster > decoding else tokens
