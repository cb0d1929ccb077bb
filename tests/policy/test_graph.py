"""The execution graph: what follows a tool, how long it takes, and how much it adds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.calibration import Calibration
from vllm_saga.policy.gaps import GapModel
from vllm_saga.policy.graph import AgentClass, AgentClasses, class_key, reuse_probability
from vllm_saga.policy.means import RunningMean
from vllm_saga.policy.toolgraph import ANSWER, START, SUBAGENTS, joined_tools, node_name

names = st.sampled_from(["read", "edit", "bash", "grep+read", ANSWER, SUBAGENTS])
walks = st.lists(st.lists(names, max_size=12), max_size=12)


def taught(*runs: list[str], growth: int = 100) -> AgentClass:
    """A class that saw whole workflows, each a list of nodes."""
    agent = AgentClass(AgentClass())
    for run in runs:
        teach(agent, run, growth)
    return agent


def teach(agent: AgentClass, run: list[str], growth: int = 100) -> None:
    before = START
    for tool in run:
        agent.observe_call(before, tool, growth)
        before = tool
    agent.observe_end_after(before, len(run))


# -- what follows -----------------------------------------------------------------------------


def test_what_always_followed_is_expected():
    agent = taught(*[["read", "edit", "bash"]] * 50)
    assert agent.next_tools("read")["edit"] > 0.9
    assert agent.next_tools(START)["read"] > 0.9
    assert agent.tools.p_end("bash") > 0.9 > 0.1 > agent.tools.p_end("read")


def test_a_tool_hardly_seen_is_followed_by_what_is_called_most():
    agent = taught(*[["bash"] * 9] * 20, ["new", "read"])
    following = agent.next_tools("new")
    assert following["bash"] > 0.6
    assert agent.next_tools("read")["bash"] > 0.6
    assert agent.next_tools("never seen") == agent.next_tools(None)


@given(walks, st.one_of(st.none(), names, st.just(START)))
def test_probabilities_sum_to_one_with_the_end(runs, tool):
    agent = taught(*runs)
    following = agent.next_tools(tool)
    assert all(0.0 <= p <= 1.0 for p in following.values())
    assert sum(following.values()) <= 1.0 + 1e-9
    if following:
        assert sum(following.values()) + agent.tools.p_end(tool) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=300))
def test_no_more_nodes_than_the_limit_whatever_is_called(pairs):
    agent = AgentClass(AgentClass())
    for before, tool in pairs:
        agent.observe_call(f"t{before}", f"t{tool}", 10)
    assert len(agent.tools) <= 64
    known = {name for name, _ in agent.tools.items()}
    assert all(set(node.next) <= known for _, node in agent.tools.items())
    assert sum(agent.next_tools(None).values()) <= 1.0 + 1e-9


def test_an_old_habit_is_forgotten():
    agent = taught(*[["read", "edit"]] * 2000)
    for _ in range(1500):
        teach(agent, ["read", "bash"])
    assert agent.next_tools("read")["bash"] > 0.85


def test_an_end_that_was_none_leaves_no_trace():
    agent = taught(["read", "edit"], ["read", "bash"])
    before = agent.record()
    for tool in ("edit", None, "unknown"):
        agent.observe_end_after(tool, 9)
        assert agent.record() != before
        agent.retract_end_after(tool, 9)
        assert agent.record() == before


# -- names ------------------------------------------------------------------------------------


def test_parallel_calls_join_in_a_node_of_their_own():
    assert node_name(["read", "bash", "read"]) == "bash+read"
    assert joined_tools("bash+read") == ("bash", "read")
    assert joined_tools("bash") == ()
    assert node_name([]) == node_name(["", "\x00"]) == ANSWER
    agent = taught(["grep", "bash+read", "edit"])
    arrows = {(edge.source, edge.target): edge for edge in agent.tools.edges()}
    for arrow in (("grep", "bash"), ("grep", "read"), ("bash", "bash+read")):
        assert arrows[arrow].parallel and arrows[arrow].probability == 1.0
    assert not arrows["bash+read", "edit"].parallel
    assert ("grep", "bash+read") not in arrows


def test_sub_agents_join_in_a_node_of_their_own():
    agent = AgentClass(AgentClass())
    for _ in range(20):
        agent.observe_call("bash", "task", 10)
        agent.observe_join("task")
        agent.gaps_after(SUBAGENTS).observe_return(300.0)
        agent.observe_call(SUBAGENTS, "edit", 10)
    assert agent.next_tools("task")[SUBAGENTS] > 0.8
    assert agent.next_tools(SUBAGENTS)["edit"] > 0.8
    # The workflow was not away meanwhile.
    assert agent.gaps.quantile_s(0.9) < 100.0 < agent.gaps_after(SUBAGENTS).quantile_s(0.5)


@given(st.lists(st.text(max_size=300), max_size=20))
def test_names_are_short_and_printable(tools):
    node = node_name(tools)
    assert node == ANSWER or all(0 < len(name) <= 64 for name in node.split("+"))
    assert node.isprintable() and len(node.split("+")) <= 4
    assert node not in (START, SUBAGENTS)


# -- gaps, growth, what is left ---------------------------------------------------------------


def test_gaps_are_those_of_the_tool_and_the_class_learns_them_too():
    agent = taught(["read", "bash"])
    for _ in range(50):
        agent.gaps_after("read").observe_return(0.05)
        agent.gaps_after("bash").observe_return(20.0)
    assert agent.gaps_after("read").quantile_s(0.9) < 0.1
    assert agent.gaps_after("bash").quantile_s(0.5) == pytest.approx(20.0, rel=0.35)
    assert 0.05 < agent.gaps.quantile_s(0.7) < 21.0
    assert agent.gaps_after("unknown") is agent.gaps_after(None) is agent.gaps


def test_a_tool_without_evidence_says_what_its_class_says():
    agent = taught(["read", "bash"])
    for _ in range(200):
        agent.gaps_after("bash").observe_return(3.0)
    own, of_class = agent.gaps_after("read"), agent.gaps
    for idle_s in (0.0, 1.0, 3.0, 10.0, 100.0):
        assert own.p_return(idle_s) == pytest.approx(of_class.p_return(idle_s), abs=0.02)
    assert own.quantile_s(0.5) == pytest.approx(of_class.quantile_s(0.5), rel=0.05)
    assert GapModel(GapModel(GapModel())).p_return(0.1) > 0.0


def test_growth_is_that_of_the_tool():
    agent = AgentClass(AgentClass())
    for index in range(100):
        agent.observe_call("read", "edit", 900 if index % 2 else 1100)
        agent.observe_call("edit", "read", 50)
    read = agent.growth_after("read")
    assert read.mean == pytest.approx(1000, rel=0.02)
    assert math.sqrt(read.variance) == pytest.approx(100, rel=0.5)
    assert agent.growth_after("edit").mean < 60
    assert agent.growth_tokens == pytest.approx(525, rel=0.1)


@given(st.lists(st.floats(0.0, 1e6), min_size=100, max_size=400))
def test_mean_and_variance_are_those_of_the_values(values):
    mean = RunningMean()
    for value in values:
        mean.observe(value)
    true = sum(values) / len(values)
    spread = sum((value - true) ** 2 for value in values) / len(values)
    assert mean.mean == pytest.approx(true, rel=0.02, abs=1e-6)
    assert mean.variance == pytest.approx(spread + true**2 / len(values), rel=0.05, abs=1e-3)


def test_without_tools_the_numbers_are_those_of_the_class():
    by_call, plain = AgentClass(AgentClass()), AgentClass(AgentClass())
    for calls in (3, 20, 7):
        for growth in range(calls):
            by_call.observe_call(None, None, 100 + growth)
            plain.observe_call(None, None, 100 + growth)
            by_call.gaps_after(None).observe_return(0.5)
            plain.gaps.observe_return(0.5)
        by_call.observe_end_after(None, calls)
        plain.observe_end(calls)
    assert by_call.record() == plain.record()
    assert by_call.remaining_growth(5)[0] == plain.remaining_growth_tokens(5)


def test_remaining_growth_is_a_random_sum():
    agent, rng = AgentClass(AgentClass()), random.Random(7)
    sums = []
    for _ in range(2000):
        calls = rng.choice((5, 20))
        growth = [rng.choice((100, 300)) for _ in range(calls)]
        for number, tokens in enumerate(growth, 1):
            agent.observe_call(None, None, tokens)
            agent.observe_progress(number)
        agent.observe_end_after(None, calls)
        sums.append(sum(growth))
    mean, variance = agent.remaining_growth(0)
    true = sum(sums) / len(sums)
    spread = sum((value - true) ** 2 for value in sums) / len(sums)
    assert mean == pytest.approx(true, rel=0.1)
    # Lengths are known to a quarter.
    assert variance == pytest.approx(spread, rel=0.35)


def test_little_is_left_after_a_tool_that_ends_workflows():
    agent = taught(*[["read", "edit", "submit"]] * 40)
    left, ended = agent.remaining_growth(3, "edit")[0], agent.remaining_growth(3, "submit")[0]
    assert ended < 0.2 * left
    assert agent.remaining_growth(3, "unknown") == agent.remaining_growth(3)


# -- reuse and confidence ---------------------------------------------------------------------


def test_reuse_gives_the_published_value():
    assert reuse_probability(900, [(0.75, 100), (0.25, 300)]) == pytest.approx(0.8625)
    assert reuse_probability(0, [(1.0, 100)]) == reuse_probability(900, []) == 0.0


def test_reuse_of_a_taught_class():
    agent = AgentClass(AgentClass())
    for index in range(400):
        following = "b" if index % 4 == 0 else "a"
        agent.observe_call("v", following, 50)
        agent.observe_call(following, "v", 300 if following == "b" else 100)
    # Eq. 4's value, less what the frequencies of all tools add: "v" itself follows at times.
    assert agent.p_reuse("v", 900) == pytest.approx(0.8625, abs=0.01)
    assert agent.p_reuse("v", 0) == 0.0
    assert taught(*[["submit"]] * 50).p_reuse("submit", 900) < 0.1


@given(walks, names, st.integers(0, 10**6))
def test_reuse_and_confidence_are_shares(runs, tool, cached):
    agent = taught(*runs)
    assert 0.0 <= agent.p_reuse(tool, cached) <= 1.0
    assert 0.0 <= agent.confidence(tool) <= 1.0


def test_confidence_comes_with_evidence_and_goes_with_surprise():
    agent, rng = AgentClass(AgentClass()), random.Random(3)
    agent.observe_call(START, "bash", 10)
    assert agent.confidence("bash") == agent.confidence(None) == 0.0
    for _ in range(200):
        agent.gaps_after("bash").observe_return(rng.lognormvariate(0.0, 1.0))
    steady = agent.confidence("bash")
    assert steady > 0.85
    for _ in range(40):
        agent.gaps_after("bash").observe_return(500.0)
    assert agent.confidence("bash") < steady - 0.1


def test_calibration_is_one_for_uniform_places_and_low_for_one():
    even, one = Calibration(), Calibration()
    for index in range(400):
        even.observe((index % 20) / 20, (index % 20 + 1) / 20)
        one.observe(0.99, 1.0)
    assert even.score > 0.99
    assert one.score < 0.1
    for _ in range(3000):
        one.observe(0.0, 1.0)
    assert one.score > 0.95


@given(st.lists(st.tuples(st.floats(-0.1, 1.1), st.floats(-0.1, 1.1)), max_size=50))
def test_calibration_stays_between_0_and_1(places):
    calibration = Calibration()
    for below, up_to in places:
        calibration.observe(below, up_to)
    assert 0.0 <= calibration.score <= 1.0


@given(st.lists(st.floats(0.0, 2000.0), max_size=60), st.floats(0.01, 0.98))
def test_quantiles_rise_and_probabilities_are_those_of_the_bins(gaps, share):
    model = GapModel(GapModel(GapModel()))
    for gap_s in gaps:
        model.observe_return(gap_s)
    assert 0.0 <= model.quantile_s(share) <= model.quantile_s(share + 0.01) <= 1000.1
    one_of_each_bin = [0.009 * 10 ** (index / 8) for index in range(41)]
    assert sum(map(model.probability, one_of_each_bin)) == pytest.approx(1.0)


# -- fingerprints -----------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_text_in_every_run_and_hides_the_salt():
    key = class_key(("secret salt", b"\x01\xff"))
    assert key.endswith("/01ff") and "secret" not in key
    assert class_key(("", b"\x01\xff")) == "/01ff"
    assert len({key, class_key(("", b"\x01\xff")), class_key(("", None)), class_key(("", 5))}) == 4


def test_classes_are_told_apart_and_bounded():
    classes = AgentClasses(limit=3)
    first = classes.get(("", b"a"))
    assert classes.get(("", b"a")) is first is classes.named("/61")
    for index in range(5):
        classes.get(("t", index))
    assert len(classes) == 3
    assert classes.get(("", b"a")) is not first
