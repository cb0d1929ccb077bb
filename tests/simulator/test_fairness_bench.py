"""The fairness benchmark: who bursts changes nothing in what the others send."""

from __future__ import annotations

import json

import msgspec
import pytest
import typer
from agents import SMALL, agent
from finished_runs import run, session
from typer.testing import CliRunner

from benchmarks import fairness


def test_a_burst_adds_to_one_tenant_and_leaves_the_others_as_they_were():
    even = fairness.work(100, seed=3, rate_per_min=2.0)
    burst = fairness.work(100, seed=3, rate_per_min=2.0, burst="heavy-2", times=4)
    assert burst[:100] == even
    added = burst[100:]
    assert {s.tenant for s in added} == {"heavy-2"}
    own = sum(s.tenant == "heavy-2" for s in even)
    assert own < len(added) < 6 * own
    assert len({s.session_id for s in burst}) == len(burst)
    last = even[-1].arrival_s
    assert even[0].arrival_s == 0 and last == pytest.approx(99 / 2.0 * 60)
    assert all(0 <= s.arrival_s <= last + 1e-6 for s in added)


def test_figures_are_told_apart_for_those_who_did_not_burst():
    sessions = [
        session(1, [9.0], tenant="calm"),
        session(2, [19.0], tenant="calm"),
        session(3, [9.0], tenant="other"),
        session(4, [39.0], tenant="loud"),
    ]
    figures = fairness.summary([run(sessions)], burst="loud")
    assert figures["slo"] == 0.5
    assert figures["slo_others"] == pytest.approx(2 / 3)
    assert figures["slo_worst"] == 0.5
    assert figures["slowdown"] == pytest.approx(2.0)
    assert figures["slowdown_others"] == pytest.approx(4 / 3)
    assert figures["jain"] == pytest.approx((1.5 + 1 + 4) ** 2 / 3 / (1.5**2 + 1 + 16))
    assert figures["tenants"]["calm"] == {"slo": 0.5, "slowdown": 1.5, "sessions": 2}


def small_mix(count, seed=0):
    names = ("heavy-1", "light-1")
    return [
        msgspec.structs.replace(
            agent(number, calls=3),
            session_id=f"{seed}-{number}",
            tenant=names[number % 2],
            arrival_s=float(number),
        )
        for number in range(count)
    ]


def test_tables_files_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(fairness.tenants, "sessions", small_mix)
    machine = tmp_path / "small.json"
    machine.write_bytes(msgspec.json.encode(SMALL))
    app = typer.Typer()
    app.command()(fairness.main)
    options = "--policies vllm --rate 60 --seeds 2 --sessions 6 --burst light-1 --output"
    options = [*options.split(), str(tmp_path), "--hardware", str(machine)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "fairness.json").read_text())
    assert list(document["cases"]) == ["even", "light-1 x4"]
    assert list(document["cases"]["even"]) == [fairness.ROOMY, "vllm"]
    loud = document["cases"]["light-1 x4"]["vllm"]["tenants"]["light-1"]
    assert loud["sessions"] > document["cases"]["even"]["vllm"]["tenants"]["light-1"]["sessions"]
    assert (tmp_path / "fairness.png").stat().st_size > 10_000


def test_who_is_not_in_the_mix_cannot_burst(tmp_path):
    app = typer.Typer()
    app.command()(fairness.main)
    done = CliRunner().invoke(app, ["--burst", "nobody", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "light-1" in done.output
