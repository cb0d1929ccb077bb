"""`vllm-saga graph`: fit, show, plot."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vllm_saga.cli import app
from vllm_saga.graph.fit import fit, steps
from vllm_saga.graph.score import score
from vllm_saga.policy import memory
from vllm_saga.policy.toolgraph import ANSWER, START, SUBAGENTS
from vllm_saga.simulator.trace import Call, Session, SharedPrefix

runner = CliRunner(env={"COLUMNS": "160"})


def call(prompt, tool=None, gap_s=None, **fields) -> Call:
    return Call(prompt, min(prompt, 100), 20, tool=tool, tool_latency_s=gap_s, **fields)


def session(number: int = 0) -> Session:
    """bash, then two tools at once, then an answer."""
    calls = (
        call(1000, "bash", 8.0),
        call(1100, "read+grep", 0.1),
        call(1300, "bash", 9.0),
        call(1400),
    )
    prefix = SharedPrefix("coder", 500)
    return Session(f"s{number}", calls, shared_prefix=prefix)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = []
    for number in range(12):
        calls = [
            {
                "prompt_tokens": one.prompt_tokens,
                "new_tokens": one.new_tokens,
                "output_tokens": one.output_tokens,
                "tool": one.tool,
                "tool_latency_s": one.tool_latency_s,
            }
            for one in session().calls
        ]
        lines.append(json.dumps({"session_id": f"s{number}", "source": "x[b]y", "calls": calls}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def graph(tmp_path, trace):
    path = tmp_path / "graph.json"
    result = runner.invoke(app, ["graph", "fit", str(trace), "-o", str(path)])
    assert result.exit_code == 0, result.output
    return path


# -- what is learned of a trace ---------------------------------------------------------------


def test_steps_of_a_session():
    seen = list(steps(session()))
    assert [step.before for step in seen] == [START, "bash", "grep+read", "bash"]
    assert [step.tool for step in seen] == ["bash", "grep+read", "bash", ANSWER]
    assert [step.gap_s for step in seen] == [None, 8.0, 0.1, 9.0]
    assert [step.growth_tokens for step in seen] == [20, 100, 200, 100]


def test_a_session_that_names_no_tool_tells_nothing_of_tools():
    seen = list(steps(Session("s", (call(1000, None, 1.0), call(1100)))))
    assert [(step.before, step.tool, step.gap_s) for step in seen] == [
        (START, None, None),
        (None, None, 1.0),
    ]


def test_sub_agents_join():
    calls = (
        call(1000, "Task", 0.5),
        call(400, "grep", 1.0, agent="sub", deps=(0,), delay_s=0.5, llm_s=2.0),
        call(500, None, agent="sub", llm_s=3.0, parent=1),
        call(1100, "bash", deps=(0, 2)),
    )
    seen = list(steps(Session("s", calls)))
    assert seen[1].before == START
    assert seen[3][:2] == (SUBAGENTS, "Task")
    assert seen[3].gap_s == pytest.approx(0.5 + 2.0 + 1.0 + 3.0)
    agent = fit([Session(f"s{n}", calls) for n in range(20)]).named("/all")
    assert agent.next_tools("Task")[SUBAGENTS] > 0.7


def test_tools_predict_gaps_better_than_the_class_alone():
    classes = fit([session(number) for number in range(30)])
    by_tool, by_class = score(classes, [session()])
    assert by_tool.means()["log_loss"] < 0.6 * by_class.means()["log_loss"]
    assert by_tool.means()["hit"] > by_class.means()["hit"]


# -- commands ---------------------------------------------------------------------------------


def test_fit_makes_a_graph_that_can_be_loaded(graph):
    document = memory.decode(graph.read_bytes())
    assert [known.key for known in document.agents] == ["/x[b]y"]
    assert {node.tool for node in document.agents[0].agent.tools} == {
        *(START, "bash", "grep+read", ANSWER),
    }


def test_fit_says_how_well_it_predicts(tmp_path, trace):
    out = str(tmp_path / "g.json")
    result = runner.invoke(app, ["graph", "fit", str(trace), "-o", out, "--test", "0.5"])
    assert result.exit_code == 0
    assert "log loss" in result.stdout and "100.0%" in result.stdout


def test_fit_knows_the_built_in_workloads(tmp_path):
    out = tmp_path / "g.json"
    command = ["graph", "fit", "builtin:service", "-o", str(out), "--sessions", "9"]
    assert runner.invoke(app, command).exit_code == 0
    assert memory.decode(out.read_bytes()).agents


def test_show_names_classes_and_tools(graph):
    result = runner.invoke(app, ["graph", "show", str(graph)])
    assert result.exit_code == 0
    for text in ("x[b]y", "bash", "grep+read", START, "gap p95", "followed by"):
        assert text in result.stdout


@pytest.mark.parametrize("name, begins", [("g.png", b"\x89PNG"), ("g.svg", b"<?xml")])
def test_plot_draws(graph, tmp_path, name, begins):
    out = tmp_path / name
    result = runner.invoke(app, ["graph", "plot", str(graph), str(out), "--agent", "x[b]"])
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(begins)


@pytest.mark.parametrize(
    "command, words",
    [
        ("show none.json", "No such file"),
        ("show bad.json", "not JSON"),
        ("show empty.json", "holds no class"),
        ("show graph.json --agent nobody", "no class 'nobody'"),
        ("plot graph.json out.gif", ".png"),
        ("plot graph.json none/out.png", "none/out.png"),
        ("plot toolless.json out.png", "nothing to draw"),
        ("fit none.jsonl -o out.json", "cannot read"),
        ("fit builtin:none -o out.json", "not a built-in workload"),
        ("fit trace.jsonl -o none/out.json", "none/out.json"),
    ],
)
def test_mistakes_are_explained(graph, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    empty = memory.AgentClasses()
    (tmp_path / "empty.json").write_bytes(memory.encode(memory.snapshot(empty)))
    empty.get(("", 1))
    (tmp_path / "toolless.json").write_bytes(memory.encode(memory.snapshot(empty)))
    result = runner.invoke(app, ["graph", *command.split()])
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_neither_vllm_nor_matplotlib_is_imported_to_start():
    code = "import sys, vllm_saga.cli; print({'vllm', 'torch', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()"
