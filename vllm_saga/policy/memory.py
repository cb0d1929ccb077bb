"""The agent classes as a JSON document, and back."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import msgspec

from vllm_saga.policy.graph import AgentClasses
from vllm_saga.policy.records import AgentRecord
from vllm_saga.policy.undecodable import UNDECODABLE

FORMAT: Literal["vllm-saga graph"] = "vllm-saga graph"
VERSION = 2
#: Classes kept at most, those used last: each takes up to some 40 kB.
MAX_CLASSES = 128


class GraphError(ValueError):
    """A document of agent classes that cannot be used; the message names what is wrong."""


class KnownAgent(msgspec.Struct, frozen=True):
    """An agent class under the `class_key` of its fingerprint."""

    key: Annotated[str, msgspec.Meta(max_length=4096)]
    agent: AgentRecord


class Document(msgspec.Struct, frozen=True):
    """All that is remembered. `everyone` is what all classes taught; `agents`, used last, last."""

    everyone: AgentRecord
    agents: Annotated[tuple[KnownAgent, ...], msgspec.Meta(max_length=MAX_CLASSES)] = ()
    format: Literal["vllm-saga graph"] = FORMAT
    version: int = VERSION


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


def snapshot(classes: AgentClasses) -> Document:
    """What is known now; later observations do not change it."""
    spare = max(len(classes) - MAX_CLASSES, 0)
    latest = itertools.islice(classes.items(), spare, None)
    agents = tuple(KnownAgent(key, agent.record()) for key, agent in latest)
    return Document(classes.everyone.record(), agents)


def to_dict(classes: AgentClasses) -> dict[str, Any]:
    """The classes as JSON types, for `from_dict`."""
    out: dict[str, Any] = msgspec.json.decode(encode(snapshot(classes)))
    return out


def from_dict(data: Any) -> AgentClasses:
    """The classes of `to_dict`.

    Raises:
        GraphError: not such a document, one of another version, or damaged.
    """
    classes = AgentClasses()
    restore(classes, _checked(data))
    return classes


def encode(document: Document) -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document) + b"\n"


def decode(data: bytes) -> Document:
    """The document of `encode`.

    Raises:
        GraphError: not JSON, not such a document, one of another version, or damaged.
    """
    try:
        return _checked(msgspec.json.decode(data))
    except UNDECODABLE as error:
        raise GraphError(f"not JSON: {error}") from error


def restore(classes: AgentClasses, document: Document) -> None:
    """Take over what is remembered; `classes` made anew are expected."""
    classes.everyone.restore(document.everyone)
    for known in document.agents:
        classes.named(known.key).restore(known.agent)


def _checked(data: Any) -> Document:
    try:
        head = msgspec.convert(data, _Head)
        if head.format != FORMAT:
            raise GraphError(f"format is {head.format!r}; an execution graph says {FORMAT!r}")
        if head.version != VERSION:
            raise GraphError(f"version {head.version} is not known here; {VERSION} is")
        document = msgspec.convert(data, Document)
    except msgspec.ValidationError as error:
        raise GraphError(f"damaged: {error}") from error
    # The prior alone weighs more: nothing learned makes these less.
    if sum(document.everyone.gaps_s.returns) < 1e-6:
        raise GraphError("damaged: everyone's gaps_s are empty")
    return document
