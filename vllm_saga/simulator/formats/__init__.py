"""Where sessions come from: built-in workloads, and trace files of three formats.

A path's format is recognised by its content:

`vllm-saga v1`     JSON lines with `calls` (`trace.py`)
`mooncake_trace`   JSON lines with `input_length`: Mooncake's traces, AIPerf inputs (`mooncake.py`)
`kv-cache-tester`  JSON with `requests`: a file, a directory of files, or one object per line
                   (`kv_cache_tester.py`)
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from vllm_saga.policy.undecodable import UNDECODABLE
from vllm_saga.simulator import builtin, trace
from vllm_saga.simulator.formats import kv_cache_tester, mooncake
from vllm_saga.simulator.formats.selection import Population, population
from vllm_saga.simulator.trace import Session, TraceError

__all__ = ["BUILTIN", "DEFAULT_COUNT", "PREFIX", "Population", "load", "population"]

BUILTIN = builtin.NAMES
#: Sessions of a built-in workload where the caller asks for no number.
DEFAULT_COUNT = 100
PREFIX = "builtin:"
_KNOWN = (
    "vllm-saga v1 (JSON lines with 'calls'), mooncake_trace (JSON lines with 'input_length' and "
    "'output_length'), kv-cache-tester (JSON with 'requests')"
)


def load(
    source: str | Path, count: int | None = None, seed: int = 0, block_size: int | None = None
) -> list[Session]:
    """The sessions of `builtin:NAME`, or of a trace file or directory.

    `count` and `seed` are for built-in workloads; a file is always read whole (`population` picks
    from it). `block_size` is for `mooncake_trace`: tokens per hash id, inferred where not given.
    Raises `TraceError`, which names file, line and field.
    """
    if str(source).startswith(PREFIX):
        return builtin.generate(str(source).removeprefix(PREFIX), count or DEFAULT_COUNT, seed)
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise TraceError(f"{path}: the directory holds no .json file (kv-cache-tester traces)")
        return kv_cache_tester.read(files)
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = f"; built in are {', '.join(PREFIX + name for name in BUILTIN)}"
        raise TraceError(f"{path}: cannot read the trace: {error.strerror}{hint}") from error
    fields = _fields(path, data)
    if "calls" in fields:
        return trace.read(path)
    if "requests" in fields:
        return kv_cache_tester.read([path])
    if "input_length" in fields:
        return mooncake.read(path, data, block_size)
    text = fields & {"text_input", "messages", "payload"}
    if text:
        raise TraceError(
            f"{path}: mooncake_trace rows with {text.pop()!r} carry text; rows need 'input_length' "
            "and 'output_length' in tokens"
        )
    raise TraceError(f"{path}: not a trace format we know; known are {_KNOWN}")


def _fields(path: Path, data: bytes) -> set[str]:
    """Names of the fields of the first object in the file."""
    first = next((line for line in data.splitlines() if line.strip()), b"")
    if not first:
        raise TraceError(f"{path}: the trace holds no session")
    for text in (first, data):
        try:
            found = msgspec.json.decode(text)
        except UNDECODABLE:
            continue
        return set(found) if isinstance(found, dict) else set()
    raise TraceError(f"{path}: neither JSON nor JSON lines; known formats are {_KNOWN}")
