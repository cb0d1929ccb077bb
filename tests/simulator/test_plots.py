"""The pictures: that they are drawn, and that what they draw is right."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import drawn, run, session

from vllm_saga.simulator import plots, result

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n"
NAMES = ["completion_cdf.png", "step_wait_cdf.png", "kv_memory.png", "means.png"]


def policies(count: int) -> list[str]:
    return ["stock", *(f"other-{k}" for k in range(count - 2)), "saga"]


def results(count: int, seeds: int = 1) -> list[result.RunResult]:
    return [
        drawn(name, seed, 1 + 4 / (1 + k), count=8, steps=6)
        for k, name in enumerate(policies(count))
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("count", [2, 13])
def test_four_pictures(tmp_path: Path, count: int) -> None:
    written = plots.plot(results(count, seeds=2), tmp_path / "new" / "folder")
    assert [path.name for path in written] == NAMES
    assert all(path.read_bytes().startswith(PNG) for path in written)


def test_runs_in_which_nothing_finished_are_drawn_too(tmp_path: Path) -> None:
    stuck = run([session(0, [None])], "saga")
    assert plots.plot([stuck, run([session(0, [0.0, 0.0])], "stock")], tmp_path)


def test_no_global_state_is_touched(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    plots.plot(results(2), tmp_path)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_nothing_to_plot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(plots.PlotError, match="there are no runs"):
        plots.plot([], tmp_path)
    with pytest.raises(plots.PlotError, match="there are no points"):
        plots.collapse_curve({"saga": []}, tmp_path / "x.png")


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(plots.PlotError, match="pip install matplotlib"):
        plots.plot(results(2), tmp_path)


def test_saga_and_stock_look_the_same_everywhere() -> None:
    for names in (policies(13), ["saga", "x", "vllm"], ["saga"]):
        styles = plots._styles(names)
        assert styles["saga"]["color"] == plots.ACCENT
        for stock in {"vllm", "stock"} & set(names):
            assert styles[stock]["color"] == plots.GREY
        looks = {(style["color"], style["ls"]) for style in styles.values()}
        assert len(looks) == len(names)


def test_curve_of_what_did_not_finish_stays_below_100() -> None:
    sessions = [session(0, [1.0]), session(1, [3.0]), session(2, [None]), session(3, [None])]
    figure = plots._completion_cdf({"saga": [run(sessions)]})
    [line] = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [2.0, 2.0, 4.0]
    assert line.get_ydata().tolist() == [0.0, 25.0, 50.0]


def test_step_waits_leave_out_first_calls() -> None:
    figure = plots._step_wait_cdf({"saga": [run([session(0, [50.0, 2.0, 0.0])])]})
    [line] = figure.axes[0].get_lines()
    # a wait of zero has no place on a logarithmic axis
    assert line.get_xdata().tolist() == [plots.SHORTEST_S, plots.SHORTEST_S, 2.0]


@pytest.mark.parametrize(("policies", "outside"), [(6, False), (7, True)])
def test_many_policies_put_the_legend_outside(policies: int, outside: bool) -> None:
    arms = {f"p{k}": [run([session(0, [1.0, 2.0])])] for k in range(policies)}
    figure = plots._step_wait_cdf(arms)
    assert bool(figure.legends) == outside
    assert (figure.axes[0].get_legend() is None) == outside


def test_memory_over_time_is_a_time_average() -> None:
    """Half the pool for the first quarter, all of it for the rest."""
    one = run(
        [],
        ended_s=100.0,
        kv_capacity_token_s=100.0 * 200,
        timeline=[(0.0, 100, 20), (25.0, 160, 40), (25.0, 200, 0)],
    )
    times, running, cached = plots.memory_over_time(one)
    assert times[0] == pytest.approx(50 / len(times)) and times[-1] < 100
    quarter = len(times) // 4
    assert running[:quarter] == pytest.approx(np.full(quarter, 50.0))
    assert cached[:quarter] == pytest.approx(np.full(quarter, 10.0))
    assert running[quarter:] == pytest.approx(np.full(3 * quarter, 100.0))
    assert cached[quarter:] == pytest.approx(np.zeros(3 * quarter), abs=1e-9)
    assert [len(part) for part in plots.memory_over_time(run([]))] == [0, 0, 0]


def test_collapse_curve_averages_runs_at_one_load(tmp_path: Path) -> None:
    points: dict[str, Any] = {
        policy: [
            (load, result.summarise(drawn(policy, seed, 1 + load * k, count=4, steps=4)))
            for load in (2.0, 0.5, 1.0)
            for seed in (0, 1)
        ]
        for k, policy in enumerate(policies(8))
    }
    path = tmp_path / "sweep" / "collapse.png"
    plots.collapse_curve(points, path, load_label="live KV / pool")
    assert path.read_bytes().startswith(PNG)

    loads, values = plots._curve(points["saga"], ("tasks_per_min",))
    assert loads == [0.5, 1.0, 2.0]
    own = [summary["tasks_per_min"] for load, summary in points["saga"] if load == 0.5]
    assert values[0] == pytest.approx(sum(own) / 2)


def test_collapse_curve_skips_loads_at_which_nothing_finished(tmp_path: Path) -> None:
    nothing = result.summarise(run([session(0, [None])]))
    some = result.summarise(run([session(0, [1.0])]))
    plots.collapse_curve({"saga": [(1.0, some), (2.0, nothing)]}, tmp_path / "x.png")
    assert plots._curve([(1.0, some), (2.0, nothing)], ("task_completion_s", "mean"))[0] == [1.0]
