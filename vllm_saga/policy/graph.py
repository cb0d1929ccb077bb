"""The Agent Execution Graph: what is known of the workflows that share a first block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256

from vllm_saga.policy.chain import Chain, common_prefix
from vllm_saga.policy.declared import Declared
from vllm_saga.policy.gaps import GapModel
from vllm_saga.policy.lengths import LengthModel
from vllm_saga.policy.means import WINDOW as _MEAN_WINDOW
from vllm_saga.policy.means import RunningMean
from vllm_saga.policy.records import AgentRecord
from vllm_saga.policy.toolgraph import SUBAGENTS, ToolGraph

_PRIOR_CYCLE_S = 10.0
_MIN_FIRST_CALLS = 8.0
_AGENTIC_SHARE = 0.5
_MAX_SHARED_BLOCKS = 1024
# Contexts that idled for 1, 2 to 3, and 4 or more calls of their sessions are told apart.
_SKIPS = 3


def reuse_probability(cached_tokens: float, successors: Iterable[tuple[float, float]]) -> float:
    """Share of what is cached that the next call is expected to use (SAGA, Eq. 4).

    successors: (probability of the next step, tokens it adds). They may sum to less than 1: with
    the rest the workflow ends, and uses nothing.
    """
    if cached_tokens <= 0.0:
        return 0.0
    total = sum(p * cached_tokens / (cached_tokens + tokens) for p, tokens in successors)
    return min(max(total, 0.0), 1.0)


class AgentClass:
    """Running statistics of one agent class (same system prompt and tools), and of its tools.

    Tokens are counts of context tokens; every mean forgets over about 500 observations. A tool is
    named by its node (`toolgraph.node_name`); None, or one that was never seen, stands for the
    class as a whole.
    """

    def __init__(self, everyone: AgentClass | None = None) -> None:
        self.gaps: GapModel = GapModel(everyone.gaps if everyone else None)
        self._lengths: LengthModel = LengthModel(everyone._lengths if everyone else None)
        self._growth: RunningMean = RunningMean(everyone._growth if everyone else None)
        parent = everyone._cycle if everyone else None
        self._cycle: RunningMean = RunningMean(parent, _PRIOR_CYCLE_S)
        self._output: RunningMean = RunningMean(everyone._output if everyone else None)
        parent = everyone._reuse if everyone else None
        self._reuse: RunningMean = RunningMean(parent, 1.0)
        parents = everyone._taken_up if everyone else (None,) * _SKIPS
        self._taken_up: tuple[RunningMean, ...] = tuple(RunningMean(p, 1.0) for p in parents)
        self.declared_gaps: Declared = Declared(everyone.declared_gaps if everyone else None)
        self.declared_calls: Declared = Declared(everyone.declared_calls if everyone else None)
        self.tools: ToolGraph = ToolGraph(self.gaps, self._growth)
        self.shared_blocks = 0
        self._last_first_chain: Chain = ()
        self._everyone = everyone
        self._anonymous_first = 0.0
        self._anonymous_continued = 0.0

    def observe_first_chain(self, chain: Chain) -> None:
        """A new context began with `chain`: what it has in common with the last one is shared."""
        chain = tuple(chain[:_MAX_SHARED_BLOCKS])
        self.shared_blocks = common_prefix(chain, self._last_first_chain)
        self._last_first_chain = chain

    def observe_end(self, calls: int) -> None:
        """A workflow has ended, or is presumed to have, after `calls` calls."""
        self.gaps.observe_end()
        self._lengths.observe_end(calls)

    def retract_end(self, calls: int) -> None:
        """A workflow presumed to have ended after `calls` calls came back after all."""
        self.gaps.retract_end()
        self._lengths.retract_end(calls)

    @property
    def growth_tokens(self) -> float:
        """Mean growth of a context by one call."""
        return self._growth.mean

    def observe_anonymous_first(self) -> None:
        """A call arrived that named no session and continued none."""
        if self._everyone is not None:
            self._everyone.observe_anonymous_first()
        if self._anonymous_first > _MEAN_WINDOW:
            self._anonymous_first *= 0.5
            self._anonymous_continued *= 0.5
        self._anonymous_first += 1.0

    def observe_anonymous_continued(self) -> None:
        """A session that nobody had named was continued by a second call."""
        if self._everyone is not None:
            self._everyone.observe_anonymous_continued()
        self._anonymous_continued += 1.0

    @property
    def agentic(self) -> bool:
        """Whether a first call without a session id most likely starts a workflow."""
        return self._anonymous_first >= _MIN_FIRST_CALLS and self._mostly_continued

    @property
    def continues(self) -> bool:
        """Whether a first call without a session id that is continued most likely started a
        workflow: unless most are not, of this class, or where it is new, of all.
        """
        if self._anonymous_first < _MIN_FIRST_CALLS:
            return self._everyone is None or self._everyone.continues
        return self._mostly_continued

    @property
    def _mostly_continued(self) -> bool:
        return self._anonymous_continued >= _AGENTIC_SHARE * self._anonymous_first

    def remaining_calls(self, calls_done: int) -> float:
        """Calls that a workflow which made `calls_done` is expected to make before it ends."""
        return self._lengths.remaining(calls_done)

    def remaining_growth_tokens(self, calls_done: int) -> float:
        """Tokens a workflow that made `calls_done` calls is expected to add before it ends."""
        return self.remaining_calls(calls_done) * self.growth_tokens

    def outlook(
        self, calls_done: int, left: float | None, tokens: float, ahead_s: Sequence[float]
    ) -> list[tuple[float, float]]:
        """By how many tokens a workflow that holds `tokens` will hold more than now, so many
        seconds ahead: mean and variance. Once it has ended it holds none.

        left: calls it has still to make, where that is known.
        """
        calls = [seconds / self.cycle_s for seconds in ahead_s]
        if left is None:
            alive = self._lengths.survival(calls_done, calls)
        else:
            alive = [float(more < left) for more in calls]
        growth, variance = self._growth.mean, self._growth.variance
        found = []
        for more, stays in zip(calls, alive, strict=True):
            size = tokens + more * growth
            spread = stays * (1.0 - stays) * size * size + stays * more * variance
            found.append((stays * size - tokens, spread))
        return found

    @property
    def sure(self) -> float:
        """How far an outlook rests on workflows of this class that have ended: 0 to 1."""
        return self._lengths.evidence

    def observe_progress(self, calls_done: int, counted: int | None = None) -> None:
        """A workflow has made its `calls_done`-th call; its first `counted` have been observed, by
        default all before.
        """
        self._lengths.observe_call(calls_done, counted)

    def observe_cycle(self, seconds: float) -> None:
        """From the end of one call to the end of the next, less what it was held."""
        self._cycle.observe(seconds)

    def observe_output(self, tokens: int) -> None:
        """One call has generated so many tokens."""
        self._output.observe(tokens)

    @property
    def output_tokens(self) -> float:
        """Mean tokens that a call generates."""
        return self._output.mean

    def observe_reuse(self, share: float) -> None:
        """A call went on from so large a part of its context; the rest was edited away."""
        self._reuse.observe(share)

    @property
    def reuse(self) -> float:
        """Mean share of a context that the call after it uses."""
        return self._reuse.mean

    def observe_skipped(self, calls: int, taken_up: bool) -> None:
        """A context idled for so many calls of its session: then it was extended, or was not."""
        for mean in self._taken_up[: calls.bit_length()]:
            mean.observe(float(taken_up))

    def takes_up(self, calls: int) -> bool:
        """Whether a context that idled for so many calls of its session is mostly extended again.

        Those of parallel agents under one id are, and who waits for a helper that makes one call;
        a sub-agent that is done is not, nor what was there before the context was cleared.
        """
        return self._taken_up[min(calls.bit_length(), _SKIPS) - 1].mean >= 0.5

    @property
    def cycle_s(self) -> float:
        """Mean seconds from the end of one call to the end of the next, less what it was held."""
        return self._cycle.mean

    # -- by tool --------------------------------------------------------------------------------

    def observe_call(self, previous: str | None, tool: str | None, growth_tokens: int) -> None:
        """A call that came after the node `previous` has ended, and its output calls `tool`.

        growth_tokens: by how much it lengthened its context (new prompt tokens and output).
        """
        if tool is not None:
            self.tools.observe(previous, tool)
        self.growth_after(previous).observe(growth_tokens)

    def observe_join(self, previous: str | None) -> None:
        """A context waited for sub-agents after `previous`: its next call comes after their end."""
        self.tools.observe(previous, SUBAGENTS)

    def observe_end_after(self, tool: str | None, calls: int) -> None:
        """A workflow ended after `tool`, having made `calls`. Takes the place of `observe_end`."""
        if (node := self.tools.get(tool)) is None:
            self.observe_end(calls)
        else:
            node.gaps.observe_end()
            self._lengths.observe_end(calls)
        self.tools.observe_end(tool)

    def retract_end_after(self, tool: str | None, calls: int) -> None:
        """A workflow presumed to have ended came back after all. In place of `retract_end`."""
        if (node := self.tools.get(tool)) is None:
            self.retract_end(calls)
        else:
            node.gaps.retract_end()
            self._lengths.retract_end(calls)
        self.tools.retract_end(tool)

    def gaps_after(self, tool: str | None) -> GapModel:
        """How long workflows stay away after `tool`. What it is told the class learns as well."""
        node = self.tools.get(tool)
        return self.gaps if node is None else node.gaps

    def growth_after(self, tool: str | None) -> RunningMean:
        """By how many tokens the call after `tool` lengthens its context: mean and variance."""
        node = self.tools.get(tool)
        return self._growth if node is None else node.growth

    def next_tools(self, tool: str | None) -> dict[str, float]:
        """Probability of each node to follow `tool`; what is missing to 1 is the end."""
        return self.tools.next_tools(tool)

    def remaining_growth(self, calls_done: int, tool: str | None = None) -> tuple[float, float]:
        """Mean (tokens) and variance (tokens²) of what a workflow adds before it ends.

        The sum of a random number of calls, which are taken as independent:
        Var = E[calls] Var[growth] + Var[calls] E[growth]². Its last call led to `tool`, after which
        it may have ended already.
        """
        calls, variance = self._lengths.remaining_moments(calls_done)
        if self.tools.get(tool) is not None:
            stays = 1.0 - self.tools.p_end(tool)
            variance = stays * variance + stays * (1.0 - stays) * calls * calls
            calls *= stays
        growth = self._growth
        mean = growth.mean
        return calls * mean, calls * growth.variance + variance * mean * mean

    def p_reuse(self, tool: str | None, cached_tokens: int) -> float:
        """Share of `cached_tokens` that the call after `tool` is expected to use (SAGA, Eq. 4)."""
        successors = self.next_tools(tool).items()
        return reuse_probability(
            cached_tokens, ((p, self.growth_after(name).mean) for name, p in successors)
        )

    def confidence(self, tool: str | None) -> float:
        """How far to trust what is said of the gap after `tool`: 0 = a guess, 1 = it comes true.

        The calibration of its predictions, as far as they rest on what was seen; for the rest that
        of the class, as far as that was seen.
        """
        trust = self.gaps.evidence * self.gaps.calibration()
        node = self.tools.get(tool)
        if node is None:
            return trust
        own = node.gaps.evidence
        return own * node.gaps.calibration() + (1.0 - own) * trust

    # -- memory ---------------------------------------------------------------------------------

    def record(self) -> AgentRecord:
        """What is worth remembering between runs, for `restore`."""
        return AgentRecord(
            gaps_s=self.gaps.record(),
            calls=self._lengths.record(),
            growth_tokens=self._growth.record(),
            cycle_s=self._cycle.record(),
            anonymous=(self._anonymous_first, self._anonymous_continued),
            ends=self.tools.ends,
            tools=self.tools.record(),
        )

    def restore(self, record: AgentRecord) -> None:
        """Take over what another run has learned; a class made anew is expected."""
        self.gaps.restore(record.gaps_s)
        self._lengths.restore(record.calls)
        self._growth.restore(record.growth_tokens)
        self._cycle.restore(record.cycle_s)
        self._anonymous_first, self._anonymous_continued = record.anonymous
        self.tools.restore(record.tools, record.ends)


@lru_cache(maxsize=1024)
def _tenant_key(tenant: str) -> str:
    return sha256(tenant.encode(errors="replace")).hexdigest()[:16] if tenant else ""


def class_key(fingerprint: Hashable) -> str:
    """A fingerprint as text, the same in every run: tenant, "/", first block hash in hex.

    A tenant is known by its cache salt, which is a secret: only its digest is kept.
    """
    if not isinstance(fingerprint, tuple) or len(fingerprint) != 2:
        return str(fingerprint)
    tenant, first = fingerprint
    text = first.hex() if isinstance(first, bytes) else "" if first is None else str(first)
    return f"{_tenant_key(str(tenant))}/{text}"


class AgentClasses:
    """The classes seen lately, at most `limit` of them (least recently used go first)."""

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        self.everyone: AgentClass = AgentClass()
        self._classes: OrderedDict[str, AgentClass] = OrderedDict()

    def get(self, fingerprint: Hashable) -> AgentClass:
        """The class of `fingerprint`, made on first sight."""
        return self.named(class_key(fingerprint))

    def named(self, key: str) -> AgentClass:
        """The class of a fingerprint's `class_key`, made on first sight."""
        found = self._classes.get(key)
        if found is None:
            found = self._classes[key] = AgentClass(self.everyone)
            if len(self._classes) > self._limit:
                self._classes.popitem(last=False)
        else:
            self._classes.move_to_end(key)
        return found

    def items(self) -> Iterator[tuple[str, AgentClass]]:
        """Keys and classes, used last come last."""
        yield from self._classes.items()

    def __len__(self) -> int:
        return len(self._classes)
