"""Were the calls of each conversation recognised as one session, and others' as another?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# Only what is posted is a call: Claude Code also sends HEAD /, which vLLM does not have.
_FAILED = re.compile(
    r'^(?:http_requests_total{[^}]*method="POST",status="[345]xx"|saga_router_refused_total{[^}]*)}'
    r" (\S+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A session as the router lists it."""

    source: str
    backend: str
    calls: int


@dataclass(slots=True)
class Conversation:
    """What became of one conversation.

    helpers: how many sub-agents it sent, each a session of its own. failed: what went wrong.
    """

    helpers: int = 0
    sessions: dict[str, Seen] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)

    def note(self, before: Mapping[str, Seen], after: Mapping[str, Seen]) -> None:
        """One turn: the sessions that had calls in it are this conversation's."""
        begun = self.sessions
        for name, seen in after.items():
            calls = seen.calls - (before[name].calls if name in before else 0)
            if calls:
                earlier = begun[name].calls if name in begun else 0
                begun[name] = Seen(seen.source, seen.backend, earlier + calls)
                self.backends.add(seen.backend)

    @property
    def calls(self) -> int:
        return sum(seen.calls for seen in self.sessions.values())


def read_sessions(listed: Sequence[Mapping[str, object]]) -> dict[str, Seen]:
    """What `GET /v1/saga/sessions` lists."""
    return {
        str(entry["session"]): Seen(
            str(entry["source"]), str(entry["backend"]), int(str(entry["calls"]))
        )
        for entry in listed
    }


def count_failures(metrics: str) -> int:
    """Calls that were answered by an error, by the metrics of vLLM or of the router."""
    return sum(int(float(count)) for count in _FAILED.findall(metrics))


def problems(source: str, conversations: Mapping[str, Conversation]) -> Iterator[str]:
    """What is not as it has to be; nothing if all is well."""
    owner: dict[str, str] = {}
    for name, conversation in conversations.items():
        yield from (f"{name}: {failure}" for failure in conversation.failed)
        if len(conversation.sessions) != 1 + conversation.helpers:
            yield f"{name}: {len(conversation.sessions)} sessions"
        if len(conversation.backends) > 1 and not conversation.helpers:
            yield f"{name}: on {len(conversation.backends)} backends"
        if conversation.calls < 2:
            yield f"{name}: {conversation.calls} calls, a turn with a tool takes two"
        for session, seen in conversation.sessions.items():
            if seen.source != source:
                yield f"{name}: recognised by {seen.source}, not by {source}"
            if owner.setdefault(session, name) != name:
                yield f"{name}: is taken for {owner[session]}"
