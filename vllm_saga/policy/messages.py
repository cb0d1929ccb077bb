"""Which conversation a request goes on with, by its messages, where its client names none."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_saga.policy.turns import Turns, estimate_tokens, read_turns, shared_prefix

__all__ = [
    "MessageLineage",
    "estimate_tokens",
    "read_response_id",
    "read_turns",
    "shared_prefix",
]

# Of the conversations that a prompt may go on with, so many are looked at.
_MAX_HEIRS = 32
_MAX_NAME_CHARS = 256
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[\w.-]{1,128})"')


@dataclass(eq=False, slots=True)
class _Conversation:
    """One conversation by its last request: `length` parts and a `tail`.

    anchors: hashes under which it is found again. advanced: it had more than one request.
    """

    key: str
    tenant: str
    root: bytes
    suffix: int
    seen: float = 0.0
    length: int = 0
    tail: bytes = b""
    advanced: bool = False
    anchors: tuple[bytes, ...] = ()


@dataclass(eq=False, slots=True)
class _Root:
    """Conversations that began alike: how many are alive, and the next suffix."""

    suffixes: set[int] = field(default_factory=set)
    following: int = 1

    def take(self) -> int:
        """The suffix of one more: 0 unless it is in use."""
        suffix = 0 if 0 not in self.suffixes else self.following
        self.following += suffix > 0
        self.suffixes.add(suffix)
        return suffix


class MessageLineage:
    """Gives all requests of one conversation the same session id, from their content alone.

    A request belongs to the conversation whose last request is the longest that it extends; the
    last turn of that one may have been rewritten. Otherwise it begins a conversation. An id is
    the hash of everything up to and including the first user turn, so that another router, or this
    one after a restart, gives the same; where several live conversations began alike (one task run
    many times), the later ones get a suffix. A system prompt in common links nothing.

    Args:
        max_sessions: conversations remembered at most, and responses likewise; the ones seen
            longest ago go first.
        idle_s: seconds without a request after which a conversation is forgotten.
    """

    def __init__(self, max_sessions: int, idle_s: float) -> None:
        self._max = max_sessions
        self._idle_s = idle_s
        self._live: OrderedDict[str, _Conversation] = OrderedDict()
        self._anchored: dict[bytes, dict[_Conversation, None]] = {}
        self._roots: dict[bytes, _Root] = {}
        self._responses: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def recognise(self, tenant: str, body: Mapping[str, Any], now: float) -> str | None:
        """The session id of a request; None if it holds nothing to tell it by.

        Args:
            now: seconds of one monotonic clock.
        """
        self._expire(now)
        earlier = body.get("previous_response_id")
        if isinstance(earlier, str) and (tenant, earlier) in self._responses:
            return self._responses[tenant, earlier][0]
        turns = read_turns(body)
        if turns is None:
            return None
        model = body.get("model")
        links = turns.links(f"{tenant}\0{model if isinstance(model, str) else None}")
        conversation = self._find(turns, links)
        if conversation is None:
            conversation = self._begin(tenant, turns, links)
        else:
            conversation.advanced = True
        self._note(conversation, turns, links, now)
        return conversation.key

    def note_response(self, tenant: str, response_id: str, session: str, now: float) -> None:
        """A response of the Responses API was given to `session`: a later request may name it."""
        if len(response_id) <= _MAX_NAME_CHARS:
            self._responses[tenant, response_id] = (session, now)
            self._responses.move_to_end((tenant, response_id))
            self._expire(now)

    def forget(self, tenant: str, session: str) -> None:
        """A session of this tenant has ended; a conversation that begins like it is another one."""
        conversation = self._live.get(session)
        if conversation is not None and conversation.tenant == tenant:
            self._drop(conversation)

    # -- inside ---------------------------------------------------------------------------------

    def _find(self, turns: Turns, links: list[bytes]) -> _Conversation | None:
        for link in reversed(links):
            heirs = self._anchored.get(link)
            if heirs is None:
                continue
            # The last seen first: a client that tries again goes on with its last try.
            for count, heir in enumerate(reversed(heirs)):
                if count == _MAX_HEIRS:
                    break
                if _extends(turns, heir):
                    return heir
        return None

    def _begin(self, tenant: str, turns: Turns, links: list[bytes]) -> _Conversation:
        root = hashlib.blake2b(links[turns.opening] + turns.tail, digest_size=16).digest()
        suffix = self._roots.setdefault(root, _Root()).take()
        key = f"msg-{root.hex()}" + (f".{suffix}" if suffix else "")
        conversation = self._live[key] = _Conversation(key, tenant, root, suffix)
        return conversation

    def _note(
        self, conversation: _Conversation, turns: Turns, links: list[bytes], now: float
    ) -> None:
        self._unanchor(conversation)
        length = conversation.length = len(turns.parts)
        conversation.tail = turns.tail
        conversation.seen = now
        # The last turn may be rewritten, but what comes before it has to say more than others do.
        first = length - 1 if length - 1 > turns.opening else max(length, 1)
        conversation.anchors = tuple(links[first:])
        for anchor in conversation.anchors:
            self._anchored.setdefault(anchor, {})[conversation] = None
        self._live.move_to_end(conversation.key)

    def _unanchor(self, conversation: _Conversation) -> None:
        for anchor in conversation.anchors:
            heirs = self._anchored[anchor]
            del heirs[conversation]
            if not heirs:
                del self._anchored[anchor]
        conversation.anchors = ()

    def _expire(self, now: float) -> None:
        while self._live:
            oldest = next(iter(self._live.values()))
            if len(self._live) <= self._max and now - oldest.seen < self._idle_s:
                break
            self._drop(oldest)
        while self._responses:
            name, (_, noted) = next(iter(self._responses.items()))
            if len(self._responses) <= self._max and now - noted < self._idle_s:
                break
            del self._responses[name]

    def _drop(self, conversation: _Conversation) -> None:
        self._unanchor(conversation)
        del self._live[conversation.key]
        root = self._roots[conversation.root]
        root.suffixes.discard(conversation.suffix)
        if not root.suffixes:
            del self._roots[conversation.root]


def _extends(turns: Turns, earlier: _Conversation) -> bool:
    """Whether a request that shares an anchor with `earlier` goes on with it.

    As long as it and no longer is one that is tried again, if `earlier` has gone beyond the
    opening that others may share.
    """
    length = len(turns.parts)
    if length < earlier.length:
        return False
    following = turns.parts[earlier.length] if length > earlier.length else turns.tail
    if not following.startswith(earlier.tail):
        return False
    longer = length > earlier.length or len(turns.tail) > len(earlier.tail)
    return longer or earlier.advanced


def read_response_id(answer: bytes) -> str | None:
    """The id that the beginning of an answer of the Responses API gives to its response."""
    match = _RESPONSE_ID.search(answer)
    return match[1].decode() if match else None
