"""`vllm-saga top`: what a frame shows, at two widths, and what is said where there is none."""

from __future__ import annotations

from io import StringIO

import pytest
from fleet_of_two import busy_engine, fleet
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_server import serving
from typer.testing import CliRunner

from vllm_saga.cli import app
from vllm_saga.policy import overview
from vllm_saga.top.view import amount, bar, frame, seconds, shortened

runner = CliRunner(env={"COLUMNS": "140"})
PATH = "/v1/saga/workflows"


def drawn(told, width: int, rows: int = 100) -> list[str]:
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(frame(told, "http://x:1  12:00:00", width, rows))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 140])
def test_a_frame_shows_every_workflow_within_the_width(width):
    told = fleet()
    lines = drawn(told, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for workflow in told["workflows"]:
        assert sum(workflow["id"][-6:] in line for line in lines) >= 1
        if workflow["state"] == "held":
            assert f"{workflow['waits_for']['short_blocks']} " in text
    assert "8 held" in lines[0] and "7 gap" in lines[0]
    assert "10.0.0.3:8000" in text and "it does not answer" in text
    assert "search-team" in text and "… " not in text.replace("…", "…")


def test_a_wide_frame_names_the_engine_and_the_deadline():
    held = [w for w in fleet()["workflows"] if w["state"] == "held"]
    lines = drawn(fleet(), 140)
    for workflow in held:
        line = next(line for line in lines if workflow["id"] in line)
        assert line.endswith(workflow["engine"])
        assert f"≤ {seconds(workflow['waits_for']['runs_within_s'])}" in line


def test_workflows_beyond_the_rows_are_counted():
    told = fleet()
    assert f"… {told['total'] - 3} more" in drawn(told, 80, rows=3)


def test_an_idle_server_and_a_stock_one_are_shown():
    stock = overview.of_engine("0", {"scheduler": "stock", "running": 2, "waiting": 1})
    text = "\n".join(drawn(stock, 80))
    assert "schedules as stock" in text and "no workflow yet" in text


def test_what_clients_name_cannot_command_the_terminal():
    told = busy_engine("0", 2)
    told["workflows"][0]["id"] = "\x1b[2J[red]x\n\u202e"
    text = "\n".join(drawn(told, 140))
    assert "\x1b" not in text and "\u202e" not in text and "?[2J[red]x??" in text


@given(st.lists(st.integers(-50, 1000), min_size=5, max_size=5), st.integers(1, 200))
def test_a_bar_is_as_wide_as_it_should_and_no_part_is_drawn_too_large(blocks, cells):
    names = ("running_blocks", "gap_blocks", "visitor_blocks", "promised_blocks", "free_blocks")
    pool = dict(zip(names, blocks, strict=True))
    pool["capacity_blocks"] = sum(max(n, 0) for n in blocks)
    text = bar(pool, cells).plain
    assert len(text) == cells
    for sign, count in zip("█▓▒░·", blocks, strict=True):
        share = max(count, 0) / max(pool["capacity_blocks"], 1)
        assert abs(text.count(sign) - cells * share) <= 1.0


@pytest.mark.parametrize(
    "value, said",
    [(None, ""), (0.04, "0.0s"), (75.2, "75s"), (1800.0, "30m"), (9e4, "25h")],
)
def test_spans_are_short(value, said):
    assert seconds(value) == said


def test_counts_and_names_are_short():
    assert [amount(n) for n in (950, 12_500, 450_000, 3_140_000)] == [
        "950", "12.5k", "450k", "3.1M",
    ]  # fmt: skip
    assert shortened("swe-agent/django-11518", 12).plain == "swe-…o-11518"


def test_once_draws_one_frame_of_a_server():
    seen: list = []
    with serving({PATH: (200, fleet())}, seen) as url:
        result = runner.invoke(app, ["top", "--once", "--url", url, "--api-key", "k"])
    assert result.exit_code == 0, result.stderr
    assert "django-11518" in result.stdout and url in result.stdout
    assert seen[0][1]["authorization"] == "Bearer k" and "x-tenant-id" not in seen[0][1]


def test_a_tenant_asks_for_itself():
    seen: list = []
    with serving({PATH: (200, fleet())}, seen) as url:
        arguments = ["top", "--once", "--url", url, "--tenant", "t", "--tenant-header", "x-team"]
        assert runner.invoke(app, arguments).exit_code == 0
    assert seen[0][1]["x-team"] == "t"


@pytest.mark.parametrize(
    "answer, said",
    [
        ((404, {"detail": "Not Found"}), "VLLM_PLUGINS=saga"),
        ((404, {"error": {"type": "saga", "message": "without --scheduler-cls saga"}}), "doctor"),
        ((401, {"error": "Unauthorized"}), "--api-key"),
        ((200, "<html>"), "tells nothing of workflows"),
        ((500, "broken"), "status 500"),
    ],
)
def test_without_an_answer_it_says_what_to_do(answer, said):
    with serving({PATH: answer}) as url:
        result = runner.invoke(app, ["top", "--once", "--url", url])
    assert result.exit_code == 1 and said in result.stderr


def test_nobody_there_and_no_url():
    for url, said in (("http://127.0.0.1:9", "does not answer"), ("localhost:8000", "no URL")):
        result = runner.invoke(app, ["top", "--once", "--url", url])
        assert result.exit_code == 1 and said in result.stderr
