"""How many tokens a call's context holds when it has ended, read from the answer as it passes."""

from __future__ import annotations

import re

_TAIL = 16 * 1024
_TOTAL = re.compile(rb'"total_tokens"\s*:\s*([0-9]{1,12})')
_INPUT = re.compile(rb'"input_tokens"\s*:\s*([0-9]{1,12})')
_OUTPUT = re.compile(rb'"output_tokens"\s*:\s*([0-9]{1,12})')


class Usage:
    """Looks at the end of the answer, where engines put their usage; keeps no more of it.

    A stream that tells no usage is taken to have one token in each of its events.
    """

    def __init__(self, prompt_tokens: int, readable: bool) -> None:
        self._prompt_tokens = prompt_tokens
        self._readable = readable
        self._tail = b""
        self._events = 0

    def feed(self, piece: bytes) -> None:
        if not self._readable:
            return
        self._events += piece.count(b"data:")
        if len(piece) >= _TAIL:
            self._tail = piece[-_TAIL:]
        else:
            self._tail = (self._tail + piece)[-_TAIL:]

    def total_tokens(self) -> int | None:
        """None where nothing can be said."""
        if not self._readable:
            return None
        if found := _TOTAL.findall(self._tail):
            return int(found[-1])
        # Anthropic's messages: the prompt's count may be far back, in the first event.
        output = _OUTPUT.findall(self._tail)
        if output:
            prompt = _INPUT.findall(self._tail)
            return int(output[-1]) + (int(prompt[-1]) if prompt else self._prompt_tokens)
        return self._prompt_tokens + self._events if self._events else None
