"""Recorded Claude Code sessions of callanjfox/kv-cache-tester, also known as `weka` traces.

One JSON object per session: `id`, `block_size`, `tool_tokens`, `system_tokens`, `hash_id_scope` and
`requests`. A request has its time `t` (seconds from the start of the session), `in` and `out`
(tokens), `hash_ids` (one per full block of the prompt), and, where recorded, `api_time` and
`think_time` (seconds), `input_types`, `output_types`, `stop`. A request of type `subagent` holds
the requests of a sub-agent instead.

What the format leaves open, and how it is read here:

* The requests of an agent are played one after the other, in the order of the file.
* A request reuses what the most fitting earlier request of the same model left, as far as the
  hashes agree. If all full blocks of that prompt are there, its answer is taken to be there too.
* A sub-agent starts after the request before it. `t` is the end of its run: that fits all
  sub-agents of the recordings. Where it cannot be (other recordings), it is the start. Times inside
  are relative to the start, or those of the session where that is impossible.
* The next request of its parent waits for it, unless its `status` is `async_launched`.
* Hashes are local to a session. Sessions share tools and system prompt if their tools have the same
  length. Where `hash_id_scope` is `global`, the hashes themselves tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vllm_saga.policy.undecodable import UNDECODABLE
from vllm_saga.simulator.formats.blocks import common, shared_prefixes
from vllm_saga.simulator.formats.decode import decode
from vllm_saga.simulator.trace import (
    Call,
    Gap,
    Seconds,
    Session,
    SharedPrefix,
    Tokens,
    TraceError,
)

#: Recorded times are rounded, some to whole seconds.
_SLACK_S = 1.0


class _Entry(msgspec.Struct, frozen=True):
    """A request, or a sub-agent with requests of its own."""

    t: Seconds
    type: Literal["n", "s", "subagent"]
    prompt: Tokens | None = msgspec.field(default=None, name="in")
    out: Tokens = 0
    model: str | None = None
    hash_ids: list[int] = []
    input_types: list[str] = []
    output_types: list[str] = []
    stop: str | None = None
    api_time: Seconds | None = None
    think_time: Seconds | None = None
    ttft: Seconds | None = None
    agent_id: str | None = None
    subagent_type: str | None = None
    duration_ms: Seconds | None = None
    status: str | None = None
    requests: list[_Entry] = []


class _Trace(msgspec.Struct, frozen=True):
    """One recorded session."""

    id: Annotated[str, msgspec.Meta(min_length=1)]
    requests: Annotated[list[_Entry], msgspec.Meta(min_length=1)]
    block_size: Annotated[int, msgspec.Meta(ge=1)] = 64
    tool_tokens: Tokens = 0
    system_tokens: Tokens = 0
    hash_id_scope: str = "local"


def read(files: Sequence[Path]) -> list[Session]:
    """Read one session per file, or one per line; raises `TraceError` naming file and field."""
    sessions: list[Session] = []
    first_prompts: list[tuple[Sequence[int], int]] = []
    seen: dict[str, str] = {}
    scopes, block_size = set(), 64
    for where, trace in _traces(files):
        if trace.id in seen:
            raise TraceError(f"{where}: id {trace.id!r} was already used in {seen[trace.id]}")
        seen[trace.id] = where
        reader = _Reader(trace, where)
        sessions.append(reader.session())
        first_prompts.append((reader.first_hashes, sessions[-1].calls[0].prompt_tokens))
        scopes.add(trace.hash_id_scope)
        block_size = trace.block_size
    if scopes != {"global"}:
        return sessions
    return [
        msgspec.structs.replace(session, shared_prefix=prefix)
        for session, prefix in zip(
            sessions, shared_prefixes(first_prompts, block_size), strict=True
        )
    ]


def _traces(files: Sequence[Path]) -> Iterator[tuple[str, _Trace]]:
    decoder = msgspec.json.Decoder(_Trace)
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TraceError(f"{path}: cannot read the trace: {error.strerror}") from error
        lines = [(k, line) for k, line in enumerate(data.splitlines(), 1) if line.strip()]
        if len(lines) > 1 and _is_json(lines[0][1]):
            for number, line in lines:
                yield f"{path}:{number}", decode(decoder, line, f"{path}:{number}")
        else:
            yield str(path), decode(decoder, data, str(path))


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line, type=msgspec.Raw)
    except UNDECODABLE:
        return False
    return True


@dataclass(slots=True)
class _Thread:
    """One agent while it is read.

    `start_s` is what its times count from; `waits` are the last calls of the sub-agents that its
    next call waits for, until `joined_s`.
    """

    agent: str | None
    start_s: float
    place: str
    spawn: int | None = None
    subagent_type: str | None = None
    last: int | None = None
    waits: list[int] = field(default_factory=list)
    joined_s: float = 0.0


class _Reader:
    """Turns one recorded session into calls; its lists are indexed like the calls."""

    def __init__(self, trace: _Trace, where: str) -> None:
        self._trace = trace
        self._where = where
        self._agents: set[str | None] = set()
        self._entries: list[_Entry] = []
        self._ends_s: list[float] = []
        # Bit i of entry k: call i has ended when call k starts.
        self._ended: list[int] = []
        self._calls: list[Call] = []

    def session(self) -> Session:
        """The session; `shared_prefix` as its token counts tell."""
        trace = self._trace
        self._play(_Thread(None, 0.0, "requests"), trace.requests)
        if not self._calls:
            raise TraceError(f"{self._where}: requests: holds no request of an agent")
        shared = min(trace.tool_tokens + trace.system_tokens, self._calls[0].prompt_tokens)
        return Session(
            session_id=trace.id,
            calls=tuple(self._calls),
            source="kv-cache-tester",
            tenant=f"cc-{trace.tool_tokens}-{trace.system_tokens}" if shared else None,
            model=self._entries[0].model,
            shared_prefix=SharedPrefix(f"tools{trace.tool_tokens}", shared) if shared else None,
        )

    @property
    def first_hashes(self) -> list[int]:
        """Hashes of the first call's prompt."""
        return self._entries[0].hash_ids

    def _play(self, thread: _Thread, entries: Sequence[_Entry]) -> None:
        for k, entry in enumerate(entries):
            if entry.type == "subagent":
                self._subagent(thread, entry, f"{thread.place}[{k}]")
            else:
                self._request(thread, entry, f"{thread.place}[{k}]")

    def _anchor(self, thread: _Thread) -> int | None:
        """The call after which the thread goes on."""
        if thread.last is not None:
            return thread.last
        if thread.spawn is not None:
            return thread.spawn
        return len(self._calls) - 1 if self._calls else None

    def _subagent(self, thread: _Thread, entry: _Entry, place: str) -> None:
        """Append the calls of a sub-agent."""
        anchor = self._anchor(thread)
        marker_s = thread.start_s + entry.t
        run_s = (entry.duration_ms or 0.0) / 1000
        earliest_s = (self._ends_s[anchor] if anchor is not None else 0.0) - _SLACK_S
        began_s = marker_s - run_s if marker_s - run_s >= earliest_s else marker_s
        first_s = entry.requests[0].t if entry.requests else 0.0
        child = _Thread(
            self._name(thread.agent, entry.agent_id or "subagent"),
            began_s if first_s + _SLACK_S < began_s else 0.0,
            f"{place}.requests",
            anchor,
            entry.subagent_type,
        )
        self._play(child, entry.requests)
        if child.last is not None and entry.status != "async_launched":
            thread.waits.append(child.last)
            end_s = began_s + run_s if run_s else self._ends_s[child.last]
            thread.joined_s = max(thread.joined_s, end_s)

    def _name(self, parent: str | None, agent: str) -> str:
        """A thread name that no other sub-agent of the session has."""
        stem = f"{parent}/{agent}" if parent else agent
        name, number = stem, 1
        while name in self._agents:
            number += 1
            name = f"{stem}#{number}"
        self._agents.add(name)
        return name

    def _request(self, thread: _Thread, entry: _Entry, place: str) -> None:
        """Append one call and say on the call before it what lies between."""
        if not entry.prompt:
            raise TraceError(f"{self._where}: {place}.in: must be at least 1")
        anchor, index = self._anchor(thread), len(self._calls)
        deps = () if anchor is None else tuple(dict.fromkeys((anchor, *thread.waits)))
        ready_s = max(thread.joined_s, 0.0 if anchor is None else self._ends_s[anchor])
        at_s = thread.start_s + entry.t
        idle_s = max(0.0, at_s - ready_s)
        told = anchor is not None and (thread.last is None or bool(thread.waits))
        if thread.last is not None:
            before = self._calls[thread.last]
            if thread.waits:
                after: dict[str, Any] = {"gap": "subagents"}
            else:
                gap = _gap(self._entries[thread.last], entry)
                idle_s = idle_s if entry.think_time is None else entry.think_time
                after = {"gap": gap, "tool_latency_s": idle_s}
            self._calls[thread.last] = msgspec.structs.replace(before, **after)
        self._ended.append(0)
        for dep in deps:
            self._ended[index] |= self._ended[dep] | 1 << dep
        call = self._call(thread, entry, anchor, index)
        call = msgspec.structs.replace(
            call,
            deps=None if deps == ((index - 1,) if index else ()) else deps,
            delay_s=idle_s if told else None,
        )
        self._calls.append(call)
        self._entries.append(entry)
        self._ends_s.append(at_s + call.model_s)
        thread.last, thread.waits, thread.joined_s = index, [], 0.0

    def _call(self, thread: _Thread, entry: _Entry, anchor: int | None, index: int) -> Call:
        """The call, without its place in time."""
        prompt = entry.prompt or 1
        parent, reusable = self._reuse(entry, anchor, self._ended[index])
        kind: Literal["branch", "root"] | None = None
        if parent is not None and reusable < self._calls[parent].context_tokens:
            kind = "branch"
        elif parent is None and index:
            parent, kind = anchor, "root"
        usual = thread.last if thread.last is not None else (index - 1 if index else None)
        return Call(
            prompt_tokens=prompt,
            new_tokens=prompt - reusable,
            output_tokens=max(1, entry.out),
            gap="end",
            kind=kind,
            parent=None if parent == usual else parent,
            agent=thread.agent,
            subagent_type=thread.subagent_type if thread.last is None else None,
            llm_s=entry.api_time,
            ttft_s=entry.ttft,
            aborted=not entry.output_types and entry.api_time is None,
        )

    def _reuse(self, entry: _Entry, anchor: int | None, ended: int) -> tuple[int | None, int]:
        """The ended call that left the most of this prompt, and how many tokens of it."""
        best, most = None, 0
        candidates = [k for k in range(len(self._calls) - 1, -1, -1) if ended >> k & 1]
        candidates.sort(key=lambda k: k != anchor)
        for k in candidates:
            reusable = self._reusable(entry, k, k == anchor, most)
            if reusable:
                best, most = k, reusable
            if k == anchor and most == self._calls[k].context_tokens:
                break
        return best, most

    def _reusable(self, entry: _Entry, index: int, is_anchor: bool, most: int) -> int:
        """Tokens at the front of the request that a call left behind; 0 if at most `most`."""
        left, call = self._entries[index], self._calls[index]
        prompt = entry.prompt or 1
        if left.model != entry.model:
            return 0
        if not left.hash_ids or not entry.hash_ids:
            # Nothing is known: an agent's next request extends the one before if it can.
            return call.context_tokens if is_anchor and prompt >= call.context_tokens else 0
        block = self._trace.block_size
        full = min(call.prompt_tokens // block, len(left.hash_ids))
        # One id tells most candidates apart, long before all are compared.
        probe = min(full, len(entry.hash_ids), most // block + 1) - 1
        if probe < 0 or left.hash_ids[probe] != entry.hash_ids[probe]:
            return 0
        shared = common(left.hash_ids, entry.hash_ids)
        if shared < full:
            found = min(shared * block, prompt)
        elif prompt >= call.context_tokens:
            found = call.context_tokens
        else:
            found = min(call.prompt_tokens, prompt)
        return found if found > most else 0


def _gap(before: _Entry, after: _Entry) -> Gap:
    """What lies between two requests of an agent."""
    if after.input_types:
        return "tool" if "tool_result" in after.input_types else "human"
    return "human" if before.stop == "end_turn" else "tool"
