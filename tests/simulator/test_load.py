"""Loads: how they are written, when sessions arrive, how many lanes fill a pool."""

import itertools
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.simulator import builtin, load
from vllm_saga.simulator.load import AutoOpen, Closed, LoadError, Open, Overcommit
from vllm_saga.simulator.trace import Call, Session


def sessions(count: int, **extra: float) -> list[Session]:
    return [Session(str(k), (Call(10, 10, 5, gap="end"),), **extra) for k in range(count)]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("closed:12", Closed(12)),
        ("overcommit:1.5", Overcommit(1.5)),
        ("open:20", Open(20.0)),
        ("open:0.5,cv=3", Open(0.5, cv=3.0)),
        ("open:trace", Open(trace=True)),
        ("open:trace,rate=30", Open(30.0, trace=True)),
        ("open:arrivals.jsonl", Open(file=Path("arrivals.jsonl"))),
        ("open:dir/a.txt,rate=2", Open(2.0, file=Path("dir/a.txt"))),
        ("open:auto80", AutoOpen(80.0)),
        ("open:auto80%,cv=3", AutoOpen(80.0, Open(cv=3.0))),
        ("open:trace,rate=auto90", AutoOpen(90.0, Open(trace=True))),
    ],
)
def test_loads_are_written_like_this(text: str, meaning: load.Load) -> None:
    assert load.parse(text) == meaning


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is not a load; allowed are closed:N, overcommit:X, open:RATE, open:autoP"),
        ("shut:3", "'shut:3' is not a load; allowed are"),
        ("open", "'open' is not a load"),
        ("open:", "'open:' is not a load"),
        ("closed:0", "N must be a number above 0, not '0'"),
        ("closed:2.5", "N must be a whole number of lanes"),
        ("closed:many", "N must be a number above 0, not 'many'"),
        ("overcommit:-1", "X must be a number above 0"),
        ("open:-3", "rate must be a number above 0"),
        ("open:inf", "rate must be a number above 0"),
        ("open:auto0", "P must be a number above 0"),
        ("open:5,cv=0", "cv must be a number above 0"),
        ("open:5,cv", "options have the form name=value, not 'cv'"),
        ("open:5,rate=3", "rate is no option here; allowed is cv="),
        ("open:trace,cv=3", "cv is no option here; allowed is rate="),
        ("open:a.txt,rate=fast", "rate must be a number above 0, not 'fast'"),
    ],
)
def test_mistakes_say_what_is_allowed(text: str, complaint: str) -> None:
    with pytest.raises(LoadError) as error:
        load.parse(text)
    assert complaint in str(error.value)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_drawn_arrivals_have_the_rate_and_the_spread(cv: float) -> None:
    arrivals = Open(30.0, cv=cv).arrivals(sessions(4_000), seed=3)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *arrivals])]
    assert statistics.mean(gaps) == pytest.approx(2.0, rel=0.15)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.15)


@given(st.integers(1, 30), st.integers(0, 9), st.floats(0.1, 1e3), st.floats(0.2, 5))
def test_drawn_arrivals_are_in_order_and_do_not_depend_on_the_count(
    count: int, seed: int, rate: float, cv: float
) -> None:
    arrivals = Open(rate, cv=cv).arrivals(sessions(count), seed)
    assert len(arrivals) == count
    assert arrivals == sorted(arrivals)
    assert arrivals == Open(rate, cv=cv).arrivals(sessions(count + 5), seed)[:count]
    assert arrivals != Open(rate, cv=cv).arrivals(sessions(count), seed + 1)


@pytest.mark.parametrize(
    "content", ["0.5\n\n30\n12\n", '{"arrival_s": 0.5}\n{"arrival_s": 30}\n12']
)
def test_arrivals_from_a_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "arrivals"
    path.write_text(content)
    assert Open(file=path).arrivals(sessions(3), 0) == [0.5, 12.0, 30.0]
    assert Open(file=path).arrivals(sessions(2), 0) == [0.5, 12.0]
    rescaled = Open(2.0, file=path).arrivals(sessions(3), 0)
    assert rescaled == pytest.approx([0, 60 * 11.5 / 29.5, 60])
    with pytest.raises(LoadError, match="holds 3 arrivals for 4 sessions"):
        Open(file=path).arrivals(sessions(4), 0)


@pytest.mark.parametrize("line", ["soon", '{"arrival": 3}', "-1", "[1]", '{"arrival_s": "x"}'])
def test_broken_arrival_files_name_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "arrivals"
    path.write_text(f"1\n{line}\n")
    with pytest.raises(LoadError, match=f"{path}:2: expected seconds"):
        load.read_arrivals(path)
    with pytest.raises(LoadError, match="cannot read the arrivals"):
        load.read_arrivals(tmp_path / "absent")


def test_arrivals_of_the_trace() -> None:
    mix = builtin.generate("tenants", 50)
    own = [one.arrival_s for one in mix]
    assert Open(trace=True).arrivals(mix, 0) == own
    backwards = list(reversed(mix))
    assert Open(trace=True).arrivals(backwards, 0) == own[::-1]
    slower = Open(10.0, trace=True).arrivals(mix, 0)
    assert slower[0] == 0.0
    assert slower[-1] == pytest.approx(49 * 6.0)
    assert Open(10.0, trace=True).arrivals(mix[:1], 0) == [0.0]
    with pytest.raises(LoadError, match="session '0' has no arrival_s"):
        Open(trace=True).arrivals(sessions(1), 0)


def test_an_automatic_load_becomes_an_open_one() -> None:
    assert AutoOpen(80).at(25.0) == Open(20.0)
    assert AutoOpen(50, Open(cv=3)).at(10.0) == Open(5.0, cv=3)
    with pytest.raises(LoadError, match="needs a rate"):
        Open().arrivals(sessions(1), 0)


def test_lanes_fill_the_pool() -> None:
    """100 tokens for 10 s, then 220 for 30 s of which the model works 5: mean 190."""
    session = Session(
        "a",
        (
            Call(90, 90, 10, tool_latency_s=8.0, gap="tool", llm_s=2.0),
            Call(200, 100, 20, tool_latency_s=25.0, gap="tool", llm_s=5.0),
            Call(230, 10, 10, gap="end", llm_s=0.0),
        ),
    )
    assert load.mean_context_tokens([session]) == pytest.approx((100 * 10 + 220 * 30) / 40)
    assert Overcommit(2.0).lanes([session], 950) == 10
    assert Overcommit(2.0).lanes([session], 10) == 1
    assert Overcommit(1.0).lanes([session, session], 294) == 2


def test_long_sessions_count_for_longer() -> None:
    brief = Session("a", (Call(90, 90, 10, llm_s=1.0),))
    long = Session("b", (Call(990, 990, 10, llm_s=9.0),))
    assert load.mean_context_tokens([brief, long]) == pytest.approx(910)


def test_the_hardware_may_time_the_calls() -> None:
    session = Session(
        "a",
        (
            Call(90, 90, 10, tool_latency_s=1.0, gap="tool", llm_s=100.0),
            Call(290, 190, 10, gap="end", llm_s=100.0),
        ),
    )
    assert load.mean_context_tokens([session], lambda call: call.new_tokens / 90) == pytest.approx(
        (100 * 2 + 300 * 19 / 9) / (2 + 19 / 9)
    )
    with pytest.raises(LoadError, match="take no time"):
        load.mean_context_tokens([Session("a", (Call(9, 9, 1),))], lambda call: 0.0)
