"""What is known of an agent class: running means over the workflows that share a first block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from vllm_saga.policy.chain import Chain, common_prefix
from vllm_saga.policy.gaps import GapModel
from vllm_saga.policy.lengths import LengthModel

_MEAN_WINDOW = 500.0
_PRIOR_CYCLE_S = 10.0
_MIN_FIRST_CALLS = 8.0
_AGENTIC_SHARE = 0.5
_MAX_SHARED_BLOCKS = 1024


class RunningMean:
    """A mean over about the last 500 values that starts from its parent's, at the weight of one."""

    def __init__(self, parent: RunningMean | None = None, start: float = 0.0) -> None:
        self._parent = parent
        self._start = start
        self._sum = 0.0
        self._weight = 0.0

    def observe(self, value: float) -> None:
        if self._parent is not None:
            self._parent.observe(value)
        if self._weight >= _MEAN_WINDOW:
            self._sum *= 0.5
            self._weight *= 0.5
        self._sum += value
        self._weight += 1.0

    @property
    def mean(self) -> float:
        start = self._start if self._parent is None else self._parent.mean
        return (self._sum + start) / (self._weight + 1.0)


class AgentClass:
    """Running statistics of one agent class (same system prompt and tools).

    Tokens are counts of context tokens; every mean forgets over about 500 observations.
    """

    def __init__(self, everyone: AgentClass | None = None) -> None:
        self.gaps: GapModel = GapModel(everyone.gaps if everyone else None)
        self._lengths: LengthModel = LengthModel(everyone._lengths if everyone else None)
        self._growth: RunningMean = RunningMean(everyone._growth if everyone else None)
        parent = everyone._cycle if everyone else None
        self._cycle: RunningMean = RunningMean(parent, _PRIOR_CYCLE_S)
        self.shared_blocks = 0
        self._last_first_chain: Chain = ()
        self._anonymous_first = 0.0
        self._anonymous_continued = 0.0

    def observe_first_chain(self, chain: Chain) -> None:
        """A new context began with `chain`: what it has in common with the last one is shared."""
        chain = tuple(chain[:_MAX_SHARED_BLOCKS])
        self.shared_blocks = common_prefix(chain, self._last_first_chain)
        self._last_first_chain = chain

    def observe_growth(self, tokens: int) -> None:
        """One call lengthened its context by `tokens` (new prompt tokens and output)."""
        self._growth.observe(tokens)

    def observe_end(self, calls: int) -> None:
        """A workflow has ended, or is presumed to have, after `calls` calls."""
        self.gaps.observe_end()
        self._lengths.observe(calls)

    @property
    def growth_tokens(self) -> float:
        """Mean growth of a context by one call."""
        return self._growth.mean

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

    def remaining_calls(self, calls_done: int) -> float:
        """Calls that a workflow which made `calls_done` is expected to make before it ends."""
        return self._lengths.remaining(calls_done)

    def remaining_growth_tokens(self, calls_done: int) -> float:
        """Tokens a workflow that made `calls_done` calls is expected to add before it ends."""
        return self.remaining_calls(calls_done) * self.growth_tokens

    def observe_cycle(self, seconds: float) -> None:
        """From the end of one call to the end of the next, less what it was held."""
        self._cycle.observe(seconds)

    def remaining_s(self, calls_done: int) -> float:
        """Seconds a workflow that made `calls_done` calls is expected to need, holds aside."""
        return self.remaining_calls(calls_done) * self._cycle.mean


class AgentClasses:
    """The classes seen lately, at most `limit` of them (least recently used go first)."""

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        self._everyone = AgentClass()
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
