"""What is known of an agent class: running means over the workflows that share a first block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from vllm_saga.policy.chain import Chain, common_prefix
from vllm_saga.policy.gaps import GapModel

_MEAN_WINDOW = 500.0
_MIN_FIRST_CALLS = 8.0
_AGENTIC_SHARE = 0.5
_LEAST_REMAINING = 0.25
_MAX_SHARED_BLOCKS = 2048


class AgentClass:
    """Running statistics of one agent class (same system prompt and tools).

    Tokens are counts of context tokens; every mean forgets over about 500 observations.
    """

    def __init__(self, everyone: GapModel) -> None:
        self.gaps = GapModel(everyone)
        self.growth_tokens = 0.0
        self.shared_blocks = 0
        self._last_first_chain: Chain = ()
        self._growth_weight = 0.0
        self._anonymous_first = 0.0
        self._anonymous_continued = 0.0

    def observe_first_chain(self, chain: Chain) -> None:
        """A new context began with `chain`: what it has in common with the last one is shared."""
        chain = tuple(chain[:_MAX_SHARED_BLOCKS])
        self.shared_blocks = common_prefix(chain, self._last_first_chain)
        self._last_first_chain = chain

    def observe_growth(self, tokens: int) -> None:
        """One call lengthened its context by `tokens` (new prompt tokens and output)."""
        self._growth_weight = min(self._growth_weight + 1.0, _MEAN_WINDOW)
        self.growth_tokens += (tokens - self.growth_tokens) / self._growth_weight

    def observe_anonymous_first(self) -> None:
        """A call arrived that named no session and continued none."""
        if self._anonymous_first > _MEAN_WINDOW:
            self._anonymous_first *= 0.5
            self._anonymous_continued *= 0.5
        self._anonymous_first += 1.0

    def observe_anonymous_continued(self) -> None:
        """A context that had named no session was continued by a second call."""
        self._anonymous_continued += 1.0

    @property
    def agentic(self) -> bool:
        """Whether a first call without a session id most likely starts a workflow."""
        return (
            self._anonymous_first >= _MIN_FIRST_CALLS
            and self._anonymous_continued >= _AGENTIC_SHARE * self._anonymous_first
        )

    def remaining_growth_tokens(self, calls_done: int) -> float:
        """Tokens a workflow that made `calls_done` calls is expected to add before it ends."""
        calls = self.gaps.expected_calls()
        remaining = max(calls - calls_done, _LEAST_REMAINING * calls)
        return remaining * self.growth_tokens


class AgentClasses:
    """The classes seen lately, at most `limit` of them (least recently used go first)."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._everyone = GapModel()
        self._classes: OrderedDict[Hashable, AgentClass] = OrderedDict()

    def get(self, fingerprint: Hashable) -> AgentClass:
        """The class of `fingerprint`, made on first sight."""
        found = self._classes.get(fingerprint)
        if found is None:
            found = self._classes[fingerprint] = AgentClass(self._everyone)
            if len(self._classes) > self._limit:
                self._classes.popitem(last=False)
        else:
            self._classes.move_to_end(fingerprint)
        return found

    def __len__(self) -> int:
        return len(self._classes)
