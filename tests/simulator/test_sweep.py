"""The sweep, end to end on a small machine: interrupted, extended, one policy run again."""

from __future__ import annotations

import json

import msgspec
from agents import SMALL
from typer import Typer
from typer.testing import CliRunner

from benchmarks import sweep

app = Typer()
app.command()(sweep.main)


def run(directory, *more):
    machine = directory / "small.json"
    machine.write_bytes(msgspec.json.encode(msgspec.structs.replace(SMALL, kv_tokens=32_000)))
    options = "--workloads W3 --open-loop= --sessions 6 --seeds 2 --processes 1"
    output = directory / "results"
    done = CliRunner().invoke(
        app, [*options.split(), "--hardware", str(machine), "--output", str(output), *more]
    )
    assert done.exit_code == 0, done.output
    return output


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    output = run(tmp_path, "--overcommit", "1.5", "--policies", "vllm,static-cap:auto")
    path = output / "points" / "W3-overcommit-1.5.json"
    first = json.loads(path.read_text())
    written = path.stat().st_mtime_ns
    text = (output / "summary.md").read_text()
    assert "nan" not in text and "## Over all points" not in text

    run(tmp_path, "--overcommit", "1.5", "--policies", "vllm,static-cap:auto")
    assert path.stat().st_mtime_ns == written

    run(tmp_path, "--overcommit", "1.0,1.5", "--policies", "vllm,saga")
    point = json.loads(path.read_text())
    names = {run["policy"] for run in point["runs"]}
    assert names == {run["policy"] for run in first["runs"]} | {"saga"}
    assert {pair["policy"] for pair in point["paired"]} == names - {"vllm"}
    assert point["config"]["static_cap"] == first["config"]["static_cap"]

    run(tmp_path, "--overcommit", "1.5", "--policies", "vllm,saga", "--again", "saga")
    assert len(json.loads(path.read_text())["runs"]) == len(point["runs"]) == 6

    text = (output / "summary.md").read_text()
    assert "| saga |" in text and "| static-cap:auto |" in text
    assert "6 sessions a run, 2 seeds" in text
    assert "## Where we stop helping" in text
    [row] = [line for line in text.splitlines() if line.startswith("| W3 |")]
    assert len([cell for cell in row.split("|") if cell.strip()]) == 5
    assert (output / "W3-overcommit.png").stat().st_size > 10_000

    assert "Bound:" not in text
    run(tmp_path, "--overcommit", "1.0,1.5", "--policies", "vllm-roomy")
    text = (output / "summary.md").read_text()
    assert "Bound: a pool that holds everything" in text
    [rivals] = [line for line in text.splitlines() if line.startswith("| *strongest rival*")]
    assert "| vllm-roomy |" in text and "vllm-roomy" not in rivals
