"""The tables: what they say, and that they fit."""

from typing import Any

import pytest
from finished_runs import document, run, session
from rich.console import Console

from vllm_saga.simulator import report, result


def printed(made: Any, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        report.show(made, console, "title")
    return capture.get()


def test_tables_fit_hundred_columns_with_thirteen_policies() -> None:
    made = document(13, 2)
    made["runs"][0]["unfinished"] = 2
    made["paired"][0]["policy"] = made["runs"][2]["policy"] = made["runs"][3]["policy"] = (
        "saga[oracle-gaps]"
    )
    text = printed(made)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "saga[oracle-gaps]" in text
    # every policy has one line in each table
    assert text.count("\npolicy-3") == text.count("\nsaga[oracle-gaps]") == 2


def test_table_marks_ties_and_doubts() -> None:
    made = document()
    for pair, mean, ci95 in zip(
        made["paired"], (1.03, 1.2), ([1.01, 1.05], [0.9, 1.5]), strict=True
    ):
        pair["task_completion_ratio"] = {"mean": mean, "ci95": ci95}
    text = printed(made)
    assert "≈1.03 (1.01-1.05)" in text
    assert "?1.20 (0.90-1.50)" in text
    assert "base" in text


def test_table_averages_seeds_and_shows_what_does_not_exist_as_a_dash() -> None:
    made = result.to_json(
        {},
        [
            run([session(0, [9])], "stock", 0),
            run([session(0, [29])], "stock", 1),
            run([session(0, [None])], "saga", 0),
            run([session(0, [None])], "saga", 1),
        ],
        "stock",
    )
    lines = printed(made).splitlines()
    stock = next(line.split() for line in lines if line.startswith("stock"))
    assert stock[:3] == ["stock", "20.0", "base"]
    saga = next(line.split() for line in lines if line.startswith("saga"))
    assert saga[:3] == ["saga", "-", "-"]
    assert lines[1].endswith("not") and saga[-1] == "1"


def test_without_a_console_the_tables_are_wide_enough(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(document(3, 3))
    assert ")\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (report.seconds, 0.0123, "0.012"),
        (report.seconds, 1.234, "1.23"),
        (report.seconds, 99.94, "99.9"),
        (report.seconds, 12345.6, "12346"),
        (report._count, 3.0, "3"),
        (report._count, 0.2, "0.2"),
        (report._count, 9999, "9999"),
        (report._count, 12345, "12.3k"),
        (report._count, 345_600, "346k"),
        (report._count, 12_345_678, "12.3M"),
        (report._count, 2.5e9, "2.5G"),
    ],
)
def test_number_formats(form: Any, value: float, text: str) -> None:
    assert form(value) == text
