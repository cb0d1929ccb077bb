"""`mooncake_trace`: Mooncake's request traces and the inputs of AIPerf.

One JSON object per line: `input_length`, `output_length` (tokens), `timestamp` (ms from the start
of the trace), `hash_ids` (one id per block of the prompt, the last block may be partial).

Rows with `session_id` are turns of one session: the first has the whole prompt, a later one only
what is new (`input_length`) and waits `delay` ms after the answer before it. AIPerf lets the
prompt grow by both, so a turn extends all that came before.

Rows without are single requests. Mooncake's are turns of conversations all the same: a row that
contains all full blocks of an earlier prompt continues it. Only blocks known to be equal count as
reusable, so the answer of the earlier turn does not. A front that more than `MAX_POPULARITY`
prompts have is a system prompt, not a conversation, and no link.

Sharing across sessions becomes `shared_prefix`, on the first call of a session (`blocks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from vllm_saga.simulator.formats.blocks import PrefixTree, common, shared_prefixes
from vllm_saga.simulator.formats.decode import decode
from vllm_saga.simulator.trace import Call, Session, TraceError

BLOCK_SIZES = (512, 64, 16, 32, 128, 256, 1024)
MAX_POPULARITY = 40

_Milliseconds = Annotated[float, msgspec.Meta(ge=0)]


class _Row(msgspec.Struct, frozen=True):
    """One line of the file."""

    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    session_id: str | None = None
    timestamp: _Milliseconds | None = None
    delay: _Milliseconds | None = None
    hash_ids: tuple[int, ...] = ()

    @property
    def arrival_s(self) -> float | None:
        return None if self.timestamp is None else self.timestamp / 1000


def read(path: Path, data: bytes, block_size: int | None = None) -> list[Session]:
    """Read a whole file; raises `TraceError` naming file, line and field."""
    decoder = msgspec.json.Decoder(_Row)
    rows = [
        (number, decode(decoder, line, f"{path}:{number}"))
        for number, line in enumerate(data.splitlines(), start=1)
        if line.strip()
    ]
    block = block_size or _infer_block_size(path, [row for _, row in rows])
    turns: dict[str, list[_Row]] = {}
    for _, row in rows:
        if row.session_id is not None:
            turns.setdefault(row.session_id, []).append(row)
    single = [(number, row) for number, row in rows if row.session_id is None]
    sessions = [_multi_turn(name, session) for name, session in turns.items()]
    firsts = [session[0] for session in turns.values()]
    for chain in _chains([row for _, row in single], block):
        number, first = single[chain[0]]
        firsts.append(first)
        sessions.append(
            _conversation(f"{path.stem}:{number}", [single[k][1] for k in chain], block)
        )
    prefixes = shared_prefixes([(row.hash_ids, row.input_length) for row in firsts], block)
    return [
        msgspec.structs.replace(session, shared_prefix=prefix)
        for session, prefix in zip(sessions, prefixes, strict=True)
    ]


def _infer_block_size(path: Path, rows: Sequence[_Row]) -> int:
    """The block size that explains the lengths of most `hash_ids`."""
    hashed = [row for row in rows if row.hash_ids]
    fits = {
        size: sum(-(-row.input_length // size) == len(row.hash_ids) for row in hashed)
        for size in BLOCK_SIZES
    }
    best = max(BLOCK_SIZES, key=lambda size: fits[size])
    if 2 * fits[best] < len(hashed):
        raise TraceError(
            f"{path}: hash_ids: no block size explains most of their lengths (tried "
            f"{', '.join(map(str, BLOCK_SIZES))}); give block_size"
        )
    return best


def _multi_turn(name: str, rows: Sequence[_Row]) -> Session:
    """A session whose later rows hold what is new."""
    calls: list[Call] = []
    for k, row in enumerate(rows):
        before = calls[-1].context_tokens if calls else 0
        call = Call(before + row.input_length, row.input_length, max(1, row.output_length))
        gap_s = _gap_s(call, row, rows[k + 1]) if k + 1 < len(rows) else None
        calls.append(
            msgspec.structs.replace(
                call, tool_latency_s=gap_s, gap="end" if gap_s is None else "tool"
            )
        )
    return Session(name, tuple(calls), source="mooncake_trace", arrival_s=rows[0].arrival_s)


def _gap_s(call: Call, row: _Row, following: _Row) -> float:
    """Seconds between the end of a turn and the next; none where neither time is given."""
    if following.delay is not None or following.timestamp is None or row.timestamp is None:
        return (following.delay or 0.0) / 1000
    return max(0.0, (following.timestamp - row.timestamp) / 1000 - call.model_s)


def _chains(rows: Sequence[_Row], block: int) -> list[list[int]]:
    """Indices of rows that continue one another, each chain in order of time."""
    tree = PrefixTree()
    full = [row.hash_ids[: row.input_length // block] for row in rows]
    for ids in full:
        tree.add(ids)
    order = sorted(range(len(rows)), key=lambda k: rows[k].timestamp or 0.0)
    chains: list[list[int]] = []
    ending_at: dict[int, list[int]] = {}
    for k in order:
        path = tree.path(full[k])
        link = next(
            (n for n in reversed(path) if n in ending_at and tree.uses[n] <= MAX_POPULARITY), None
        )
        if link is None:
            chain = [k]
            chains.append(chain)
        else:
            chain = ending_at.pop(link)
            chain.append(k)
        if path:
            ending_at[path[-1]] = chain
    return chains


def _conversation(name: str, rows: Sequence[_Row], block: int) -> Session:
    """A session out of whole prompts that continue one another."""
    calls: list[Call] = []
    for k, row in enumerate(rows):
        reusable = 0
        if k:
            shared = common(rows[k - 1].hash_ids, row.hash_ids) * block
            reusable = min(shared, rows[k - 1].input_length, row.input_length)
        call = Call(
            row.input_length,
            row.input_length - reusable,
            max(1, row.output_length),
            kind="branch" if k else None,
        )
        if k + 1 == len(rows):
            calls.append(msgspec.structs.replace(call, gap="end"))
            continue
        timed = row.timestamp is not None and rows[k + 1].timestamp is not None
        gap_s = _gap_s(call, row, rows[k + 1]) if timed else None
        calls.append(msgspec.structs.replace(call, tool_latency_s=gap_s, gap="human"))
    return Session(name, tuple(calls), source="mooncake_trace", arrival_s=rows[0].arrival_s)
