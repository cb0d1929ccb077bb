"""What calls are made of: token ids and block hashes, so that prefixes hit as they would.

Nothing is hashed. Two calls have a block in common exactly where the trace says that one extends
the other, so a block's hash is its origin: which session's call first wrote it, and where. vLLM
hashes incrementally through `Request.block_hasher`; ours hands out the next known hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from vllm_saga.simulator.records import LiveSession

_PERIOD = 251
_PATTERN = bytes(range(_PERIOD)) * 2
_GROUP_CALL = b"\xff" * 4


@dataclass(eq=False, slots=True)
class CallContent:
    """Prompt and output tokens of one call, and the hashes of all their full blocks."""

    prompt: list[int]
    output: list[int]
    hashes: list[bytes]
    block_size: int

    def block_hasher(self, request: Any) -> list[bytes]:
        """The hashes that vLLM's request does not have yet (vllm/v1/request.py)."""
        return self.hashes[len(request.block_hashes) : request.num_tokens // self.block_size]


class SessionContent:
    """Makes the contents of one session's calls, and keeps only what a later call extends."""

    def __init__(self, session: LiveSession, block_size: int) -> None:
        self._trace = session.trace
        self._key = _key(f"session/{session.id}")
        self._block_size = block_size
        self._contexts: dict[int, tuple[list[int], list[bytes]]] = {}
        self._ahead: dict[int, CallContent] = {}
        self._children = [0] * len(session.trace.calls)
        for parent in session.trace.parents:
            if parent is not None:
                self._children[parent] += 1

    def call(self, index: int) -> CallContent:
        """Content of a call; each is asked for once."""
        return self._ahead.pop(index, None) or self._make(index)

    def _make(self, index: int) -> CallContent:
        spec = self._trace.calls[index]
        tokens, hashes = self._inherited(index)
        kept = len(tokens)
        tokens += _tokens(self._key[0] + 31 * index, spec.prompt_tokens - kept)
        output = _tokens(self._key[1] + 17 * index, spec.output_tokens)
        size = self._block_size
        hashes += [
            self._key + index.to_bytes(4, "big") + block.to_bytes(4, "big")
            for block in range(len(hashes), (spec.prompt_tokens + spec.output_tokens) // size)
        ]
        if self._children[index]:
            self._contexts[index] = (tokens + output, hashes)
        return CallContent(tokens, output, hashes, size)

    def _inherited(self, index: int) -> tuple[list[int], list[bytes]]:
        """Tokens and full blocks at the front of the prompt that exist already."""
        spec, parent = self._trace.calls[index], self._trace.parents[index]
        if parent is None:
            return self._shared()
        if parent not in self._contexts:
            # Side by side, a child may be issued before the call whose context it extends.
            self._ahead[parent] = self._make(parent)
        tokens, hashes = self._contexts[parent]
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._contexts[parent]
        kept = min(spec.reusable_tokens, len(tokens))
        return tokens[:kept], hashes[: kept // self._block_size]

    def _shared(self) -> tuple[list[int], list[bytes]]:
        """The front of a first call that all sessions of its group have in common."""
        shared = self._trace.shared_prefix
        if shared is None or not shared.tokens:
            return [], []
        count = min(shared.tokens, self._trace.calls[0].prompt_tokens)
        key = _key(f"group/{shared.group}")
        hashes = [
            key + _GROUP_CALL + block.to_bytes(4, "big")
            for block in range(count // self._block_size)
        ]
        return _tokens(key[0], count), hashes


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _tokens(start: int, count: int) -> list[int]:
    """`count` small token ids, a repeating pattern from `start`."""
    start %= _PERIOD
    whole = _PATTERN[start : start + _PERIOD] * (count // _PERIOD + 1)
    return list(whole[:count])
