"""What comes from outside: JSON values of every kind, valid ones with changes, and their bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

#: Text with what breaks: lone surrogates, NUL, other scripts, digits, what other texts end with.
texts = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\0", "\ud800", "é", "１２", "x" * 300, "x" * 5000, "nan", "1e999", "-1", "[", "{}"]
)
huge = st.sampled_from(
    [2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, -(10**400), 1e308, 5e-324, -0.0]
)
odd_floats = st.sampled_from([float("nan"), float("inf"), float("-inf")])
scalars = st.none() | st.booleans() | st.integers() | huge | st.floats() | odd_floats | texts


@st.composite
def nested(draw: st.DrawFn) -> Any:
    """Lists or objects in one another, up to beyond what JSON parsers take."""
    value: Any = draw(scalars)
    depth = draw(st.sampled_from([1, 8, 9, 60, 300, 450, 900, 5000]))
    is_list = draw(st.booleans())
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


#: JSON values that are no deeper than a few levels, and those that are.
shallow = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
values = shallow | nested()


@st.composite
def changed(draw: st.DrawFn, valid: st.SearchStrategy[Any], most: int = 3) -> Any:
    """A valid JSON value in which up to `most` places hold something else, or nothing."""
    whole = [copy.deepcopy(draw(valid))]
    for _ in range(draw(st.integers(0, most))):
        _change(draw, whole)
    return whole[0]


def _change(draw: st.DrawFn, whole: list[Any]) -> None:
    at: Any = whole
    key: Any = 0
    while isinstance(at[key], (dict, list)) and at[key] and draw(st.integers(0, 3)):
        at = at[key]
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw(st.sampled_from(keys))
    what = draw(st.sampled_from(["replace", "replace", "drop", "double", "wrap"]))
    if what == "drop" and at is not whole:
        del at[key]
    elif what == "double" and isinstance(at, list) and at is not whole:
        at.insert(key, at[key])
    elif what == "wrap":
        at[key] = [at[key]]
    else:
        at[key] = draw(values)


@st.composite
def encoded(draw: st.DrawFn, valid: st.SearchStrategy[Any]) -> bytes:
    """JSON of a value, as clients write it, perhaps with damaged bytes."""
    value = draw(valid)
    try:
        data = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    except RecursionError:
        data = b"[" * 5000 + b"]" * 5000
    return draw(damaged(data))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which none, or some, are others."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        data = data[:start] + draw(st.binary(max_size=8)) + data[start + length :]
    return data


@st.composite
def lines(draw: st.DrawFn, valid: st.SearchStrategy[Any]) -> bytes:
    """JSON lines."""
    return b"\n".join(draw(st.lists(encoded(valid), max_size=4)))
