"""What a replica has taken on, in tokens of KV: by the router's own count and by its report."""

from __future__ import annotations

from collections import OrderedDict

from vllm_saga.router.fleet import EngineReport, HeldCall, SessionKey
from vllm_saga.router.replicas import Replica

# A pool where no engine has said how large its own is: any number does while all are alike.
_UNKNOWN_POOL_TOKENS = 400_000
# Believed of engines that do not say how fast they prefill.
_UNKNOWN_PREFILL_TOKENS_PER_S = 5_000.0
_MAX_WARM = 512
# However little is known of who leaves when: a pool is not full of the same for longer.
_TURNOVER_S = 2_000.0


class Load:
    """The load of one replica.

    own: what the sessions at home here need, as the router expects; `sessions`: how many they are.
    A report adds what else the engine has to do; sessions that came since count on top of it.

    run: changes when the engine was restarted or has left, and nobody's KV is there any more.
    held: calls that the engine holds, as reported, less those taken away since; oldest first.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.run = 1
        self.own = 0.0
        self.sessions = 0
        self.held: OrderedDict[SessionKey, HeldCall] = OrderedDict()
        self.report: EngineReport | None = None
        self.kept: frozenset[SessionKey] = frozenset()
        self.roomy_since: float | None = None
        self._leaves_per_s = 0.0
        self._held_tokens = 0
        self._fresh: dict[SessionKey, float] = {}
        self._fresh_tokens = 0.0
        self._warm: OrderedDict[int, None] = OrderedDict()

    # -- events ---------------------------------------------------------------------------------

    def count(self, sessions: int, need: float, leaves_per_s: float) -> None:
        """So many sessions more are at home here, and need so many tokens more, of which so many
        become free a second.
        """
        self.sessions += sessions
        self.own = max(self.own + need, 0.0)
        self._leaves_per_s = max(self._leaves_per_s + leaves_per_s, 0.0)

    def receive(self, session: SessionKey, need: float) -> None:
        """A session comes that the last report does not know of."""
        self._fresh_tokens += need - self._fresh.get(session, 0.0)
        self._fresh[session] = need

    def release(self, session: SessionKey) -> None:
        """A session goes elsewhere, which may have been held here, or come since the report."""
        self._fresh_tokens -= self._fresh.pop(session, 0.0)
        call = self.held.pop(session, None)
        if call is not None:
            self._held_tokens -= call.tokens

    def warm(self, prefix: int | None) -> None:
        """A prompt with this prefix is computed here."""
        if prefix is not None:
            self._warm[prefix] = None
            self._warm.move_to_end(prefix)
            if len(self._warm) > _MAX_WARM:
                self._warm.popitem(last=False)

    def is_warm(self, prefix: int | None) -> bool:
        return prefix in self._warm

    def on_report(self, report: EngineReport) -> None:
        if self.report is not None and report.started != self.report.started:
            self.forget()
        self.report = report
        self.kept = frozenset(report.sessions)
        self.held = OrderedDict()
        for call in report.held_calls:
            self.held.setdefault(call.key, call)
        self._held_tokens = sum(call.tokens for call in self.held.values())
        self._fresh.clear()
        self._fresh_tokens = 0.0

    def forget(self) -> None:
        """Nothing is cached here any more."""
        self.run += 1
        self.report = None
        self.kept = frozenset()
        self.held.clear()
        self._fresh.clear()
        self.own = self._leaves_per_s = self._fresh_tokens = 0.0
        self.sessions = 0
        self._held_tokens = 0
        self._warm.clear()

    # -- questions ------------------------------------------------------------------------------

    @property
    def kv_tokens(self) -> int:
        """The KV pool; 0 where nobody has told."""
        return self.report.kv_tokens if self.report is not None else 0

    @property
    def holds_back(self) -> bool:
        """Whether this engine decides who is resident: then who has to wait is in its report."""
        report = self.report
        return report is not None and bool(report.resident or report.held_calls)

    def committed(self) -> float:
        """Tokens of KV that who is here needs, those who wait included."""
        if self.report is None:
            return self.own
        return max(self.own, self.report.used_tokens + self._held_tokens + self._fresh_tokens)

    def agents(self) -> int:
        """Sessions that are under way here, those between two calls included."""
        report = self.report
        if report is None:
            return self.sessions
        if not self.holds_back:
            return max(self.sessions, report.running + report.waiting)
        return max(self.sessions, report.resident + len(self.held) + len(self._fresh))

    def share(self, more: float = 0.0, pool: int = 0) -> float:
        """`committed` and `more` tokens over the pool, or over `pool` where it is not known."""
        return (self.committed() + more) / (self.kv_tokens or pool or _UNKNOWN_POOL_TOKENS)

    def wait_s(self, more: float, ahead: float | None = None) -> float:
        """Seconds until `more` tokens have room behind `ahead` (default: all that is committed)."""
        if not self.kv_tokens:
            return 0.0
        before = self.committed() if ahead is None else ahead
        lacking = before + more - self.kv_tokens
        if lacking <= 0.0:
            return 0.0
        return lacking / max(self._leaves_per_s, self.kv_tokens / _TURNOVER_S)

    def prefill_s(self, tokens: float) -> float:
        rate = self.report.prefill_tokens_per_s if self.report is not None else 0.0
        return tokens / (rate or _UNKNOWN_PREFILL_TOKENS_PER_S)
