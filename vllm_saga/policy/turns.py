"""What a request asks a model to read: its turns, as they are compared, counted and hashed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

_BYTES_PER_TOKEN = 4
_TOKENS_PER_IMAGE = 1000
_CHUNK_BYTES = 512
# Written anew by clients with each request, or left out when an answer is sent back.
_VOLATILE = frozenset(("cache_control", "reasoning", "reasoning_content", "id", "status"))
_THOUGHTS = frozenset(("thinking", "redacted_thinking", "reasoning"))
_BILLING = "x-anthropic-billing-header"
_MODEL_ROLES = frozenset(("assistant", "tool", "function", "model"))
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Turns:
    """A request's prompt, cut where a later one may go on.

    parts: turns, or equal chunks of a plain prompt, as bytes. opening: how many of them are there
    before a model has said anything. tail: what is left behind the last chunk.
    """

    parts: list[bytes]
    opening: int
    tail: bytes = b""

    def links(self, start: str) -> list[bytes]:
        """The hash of each leading run of parts, from none of them to all of them."""
        link = hashlib.blake2b(start.encode("utf-8", "replace"), digest_size=16).digest()
        links = [link]
        for part in self.parts:
            link = hashlib.blake2b(link + part, digest_size=16).digest()
            links.append(link)
        return links


def read_turns(body: Mapping[str, Any]) -> Turns | None:
    """The turns of a chat, Anthropic messages, responses or completions request; None if it has
    none.

    What a client changes between two requests of one conversation is left out: cache marks,
    thoughts, Claude Code's billing line, and whether a text stands alone or in a list.
    """
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        return _read_plain(body.get("prompt"))
    said = [message for message in messages if not _is_thought(message)]
    if not said:
        return None
    before = _instructions(body)
    return Turns([_encode(turn) for turn in (*before, *said)], len(before) + _opening(said))


def shared_prefix(body: Mapping[str, Any]) -> int | None:
    """Hash of the system prompt and the tools, 64 bits; None if a request has neither."""
    turns = _instructions(body)
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list):
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ("system", "developer"):
                break
            turns.append(message)
    tools = body.get("tools")
    if tools:
        turns.append(tools)
    if not turns:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for turn in turns:
        digest.update(_encode(turn))
    return int.from_bytes(digest.digest())


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Tokens of a request's prompt, by its length: within a third or so for text and code."""
    size = tokens = 0
    left = [body.get(name) for name in ("system", "instructions", "tools", "messages", "input")]
    left.append(body.get("prompt"))
    while left:
        value = left.pop()
        if isinstance(value, str):
            size += len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, list):
            if value and isinstance(value[0], int):
                tokens += len(value)
            else:
                left += value
        elif isinstance(value, dict):
            if _is_image(value):
                tokens += _TOKENS_PER_IMAGE
            else:
                left += value.values()
    return tokens + -(-size // _BYTES_PER_TOKEN)


def _instructions(body: Mapping[str, Any]) -> list[Any]:
    """The system prompt where it is not among the messages."""
    found = []
    for name in ("system", "instructions"):
        value = body.get(name)
        if isinstance(value, list):
            value = [block for block in value if not _is_billing(block)]
        if value:
            found.append({"role": "system", "content": value})
    return found


def _opening(messages: list[Any]) -> int:
    """How many messages there are up to the first user turn, and before a model answers it."""
    user_spoke = False
    for index, message in enumerate(messages):
        if _is_of_model(message):
            if user_spoke:
                return index
        elif isinstance(message, dict) and message.get("role") == "user":
            user_spoke = True
    return len(messages)


def _is_of_model(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    role = message.get("role")
    if role is None:
        return bool(message.get("type", "message") != "message")
    return isinstance(role, str) and role in _MODEL_ROLES


def _is_thought(message: object) -> bool:
    return isinstance(message, dict) and message.get("type") == "reasoning"


def _is_billing(block: object) -> bool:
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith(_BILLING)


def _is_image(block: dict[str, Any]) -> bool:
    kind = block.get("type")
    return isinstance(kind, str) and ("image" in kind or "audio" in kind)


def _read_plain(prompt: object) -> Turns | None:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        data = prompt.encode("utf-8", "surrogatepass")
    elif isinstance(prompt, list):
        try:
            data = array("q", prompt).tobytes()
        except (TypeError, OverflowError):
            return None
    else:
        return None
    if not data:
        return None
    ends = range(_CHUNK_BYTES, len(data) + 1, _CHUNK_BYTES)
    parts = [data[end - _CHUNK_BYTES : end] for end in ends]
    return Turns(parts, len(parts), data[len(parts) * _CHUNK_BYTES :])


def _encode(turn: object) -> bytes:
    try:
        return msgspec.json.encode(_plain(turn, _MAX_DEPTH), order="deterministic")
    except (TypeError, ValueError, OverflowError, RecursionError):
        # Lone surrogates, huge numbers, absurd nesting: JSON to Python, but not to everyone.
        return _encode_odd(turn)


def _encode_odd(turn: object) -> bytes:
    pieces: list[bytes] = []
    left = [turn]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [part for pair in value.items() for part in pair]
        elif isinstance(value, list):
            left += value
        else:
            pieces.append(repr(value).encode("utf-8", "backslashreplace"))
    return b"\0".join(pieces)


def _plain(value: Any, depth: int) -> Any:
    """`value` without what is volatile, and with a lone text in place of a list of one."""
    if not depth:
        return value
    if isinstance(value, dict):
        return {key: _plain(value[key], depth - 1) for key in value if key not in _VOLATILE}
    if isinstance(value, list):
        kept = [item for item in value if not (isinstance(item, dict) and _is_thinking(item))]
        if len(kept) == 1 and (text := _lone_text(kept[0])) is not None:
            return text
        return [_plain(item, depth - 1) for item in kept]
    return value


def _is_thinking(block: dict[str, Any]) -> bool:
    kind = block.get("type")
    return isinstance(kind, str) and kind in _THOUGHTS


def _lone_text(block: object) -> str | None:
    if not isinstance(block, dict):
        return None
    text = block.get("text")
    known = block.keys() <= {"type", "text", "cache_control"}
    return text if known and isinstance(text, str) else None
