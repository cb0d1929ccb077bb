"""Deterministic token ids whose prefixes repeat exactly as the trace says.

New tokens are drawn from a generator seeded by (namespace, session, call), so no two blocks are
equal by chance; the first `prefix_tokens` of a session come from a generator seeded by its group,
so sessions of one group share exactly those. A prompt is `context of the parent[:reusable] + new
tokens`, where the context is the parent's prompt followed by the ids the server really generated,
and the first new token differs from what the parent had in that place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.live.scale import ScaledSession

#: Ids below this may be special (bos, eos); they are never sent.
FIRST_ID = 8


class TokenSource:
    """Builds the prompts of one session; runs with different namespaces share nothing."""

    def __init__(self, session: ScaledSession, vocabulary: int, namespace: str) -> None:
        self._session = session
        self._top = vocabulary - 1
        self._namespace = namespace
        self._contexts: dict[int, list[int]] = {}

    def prompt(self, index: int) -> list[int]:
        """Token ids of call `index`; the calls it depends on must have been completed."""
        call = self._session.calls[index]
        parent = self._contexts[call.parent] if call.parent is not None else []
        if index == 0:
            head = self._draw(f"group/{self._session.prefix_group}", self._session.prefix_tokens)
        else:
            head = parent[: call.reusable_tokens]
        new = self._draw(
            f"session/{self._session.session_id}/{index}", call.prompt_tokens - len(head)
        )
        if len(head) < len(parent) and new[0] == parent[len(head)]:
            new[0] = new[0] + 1 if new[0] < self._top else FIRST_ID
        return head + new

    def complete(self, index: int, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Remember what call `index` left behind: its prompt and the ids the server generated."""
        self._contexts[index] = [*prompt, *generated]

    def _draw(self, key: str, count: int) -> list[int]:
        rng = random.Random(f"{self._namespace}/{key}")
        return rng.choices(range(FIRST_ID, self._top + 1), k=count)
