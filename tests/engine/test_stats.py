"""Numbers from the scheduler to Prometheus: what they say, what they cost, what cannot break."""

from __future__ import annotations

import re
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from test_equivalence import multi_turn
from vllm.v1.metrics.stats import SchedulerStats

from vllm_saga.config import SagaConfig
from vllm_saga.engine import metrics, series, stats
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.tally import MOST_VALUES, Tally
from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler

TENANT_METRICS = (series.TENANT_GPU_S, series.TENANT_POOL_S, series.TENANT_WAITING)


class Listener:
    """The front end: what it is sent goes into a registry of its own."""

    def __init__(self, scheduler) -> None:
        self.registry = CollectorRegistry()
        self.metrics = metrics.EngineMetrics("model", [0], self.registry)
        self.reports = 0
        upstream = scheduler.make_stats

        def make_stats(*args, **kwargs):
            made = upstream(*args, **kwargs)
            sent = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=SchedulerStats)
            report = stats.take(sent)
            assert not sent.waiting_lora_adapters
            if report is not None:
                self.reports += 1
                self.metrics.record(report, 0)
            return made

        scheduler.make_stats = make_stats

    def value(self, name: str, **labels: str) -> float:
        labels = {"model_name": "model", "engine": "0", **labels}
        found = self.registry.get_sample_value(series.PREFIX + name, labels)
        assert found is not None, (name, labels)
        return found


def run_under_pressure(scheduler, dt: float = 0.05, **more) -> Driver:
    """Twelve sessions on a pool too small for them, to their end."""
    script = multi_turn(seed=2, sessions=12, turns=6, with_ids=True)
    driver = Driver(scheduler)
    for step in range(script.steps):
        for call in script.arrivals.get(step, []):
            call = dict(call)
            driver.add(make_request(call.pop("request_id"), **call, **more))
        driver.step()
        driver.now += dt
    driver.drain(20_000, dt=dt)
    return driver


@pytest.mark.parametrize("overlapping", [False, True])
def test_what_operators_see_is_what_happened(overlapping):
    scheduler = make_scheduler("saga", blocks=60, overlapping=overlapping)
    listener = Listener(scheduler)
    driver = run_under_pressure(scheduler)
    state = scheduler.saga.state()
    value = listener.value

    holds = sum(value("holds_total", reason=reason) for reason in ("no_room", "in_line"))
    assert holds == state["holds"] > 0
    ended = sum(value("hold_seconds_count", workflow=kind) for kind in ("new", "begun"))
    assert 0 < ended <= holds
    assert sum(value("hold_seconds_sum", workflow=kind) for kind in ("new", "begun")) > 0.0
    gave = sum(value("residency_lost_total", reason=r) for r in ("gave_way", "idle_engine"))
    assert gave == state["gave_way"]
    assert value("residency_lost_total", reason="displaced") == state["displaced"]
    hit, lost = (value("resumed_tokens_total", cache=cache) for cache in ("hit", "lost"))
    assert hit > 0 and lost >= 0
    returns = value("gap_seconds_count")
    late, early = (value("gap_error_seconds_count", returned=r) for r in ("later", "sooner"))
    assert 0 < returns == late + early <= len(driver.finished) - 12
    assert value("workflows", state="held") == value("workflows", state="running") == 0
    assert value("used_blocks") == state["used_blocks"] <= value("capacity_blocks")
    assert value("protected_blocks") <= value("used_blocks")
    assert value("active") == 1 and value("policy_failures_total") == 0
    assert value("tenant_gpu_seconds_total", tenant=stats.NO_TENANT) > 0
    assert value("fairness_jain") == pytest.approx(1.0)


def test_who_is_held_shows_while_it_is():
    scheduler = make_scheduler("saga", blocks=60)
    listener = Listener(scheduler)
    driver = Driver(scheduler)
    for number in range(12):
        driver.add(make_request(f"c{number}", [number] * 300, 200, session_id=f"s{number}"))
    for _ in range(50):
        driver.step()
        driver.now += 0.1
    residency = scheduler.saga.residency
    assert listener.value("workflows", state="held") == residency.held_workflows > 0
    assert listener.value("held_calls") == residency.held_calls
    assert listener.value("workflows", state="running") == len(residency.residents) > 0
    assert listener.value("tenant_waiting", tenant=stats.NO_TENANT) == residency.held_workflows
    assert listener.value("oldest_hold_seconds") == pytest.approx(4.9, abs=1.1)
    driver.abort(next(name for name in scheduler.saga.calls if scheduler.saga.is_held(name)))
    driver.drain(20_000, dt=0.1)
    assert listener.value("holds_aborted_total") == 1
    assert listener.value("tenant_waiting", tenant=stats.NO_TENANT) == 0


def test_what_is_recomputed_is_counted_as_lost():
    scheduler = make_scheduler("saga", blocks=200)
    listener = Listener(scheduler)
    driver = Driver(scheduler)
    context = list(range(320))
    for again in range(3):
        if again == 2:
            assert scheduler.reset_prefix_cache()
        driver.add(make_request(f"c{again}", [x % 400 for x in context], 4, session_id="s"))
        driver.drain(100, dt=0.02)
        driver.now += 1.0
    assert listener.value("resumed_tokens_total", cache="hit") == 304
    assert listener.value("resumed_tokens_total", cache="lost") == 304


def test_the_end_of_a_task_is_told():
    scheduler = make_scheduler("saga", blocks=200)
    listener = Listener(scheduler)
    driver = Driver(scheduler, now=1.0)
    for number in range(2):
        last = {"saga_last": 1} if number else {}
        driver.add(make_request(f"c{number}", [7] * (100 + 40 * number), 4, session_id="s", **last))
        driver.drain(100, dt=0.02)
        driver.now += 20.0
    assert listener.value("sessions_ended_total") == 1
    assert listener.value("task_seconds_count") == 1
    assert listener.value("task_seconds_sum") == pytest.approx(20.0, abs=1.0)
    assert listener.value("sessions") == 0


def test_reports_are_seldom_and_the_last_one_tells_all():
    scheduler = make_scheduler("saga", blocks=500)
    listener = Listener(scheduler)
    driver = Driver(scheduler)
    driver.add(make_request("a", [5] * 64, 300, session_id="a"))
    driver.drain(2_000, dt=0.01)
    assert 3 <= listener.reports <= 6
    driver.add(make_request("b", [6] * 64, 3, session_id="b"))
    driver.drain(100, dt=0.01)
    assert listener.value("sessions") == 2


def test_after_a_fault_of_the_policy_the_gauges_are_not_those_of_before(monkeypatch):
    scheduler = make_scheduler("saga", blocks=60)
    listener = Listener(scheduler)
    driver = Driver(scheduler)
    for number in range(12):
        driver.add(make_request(f"c{number}", [number] * 300, 40, session_id=f"s{number}"))
    driver.step()
    assert listener.value("workflows", state="held") > 0
    monkeypatch.setattr(scheduler.saga, "on_step", lambda now: 1 / 0)
    driver.drain(20_000, dt=0.1)
    assert len(driver.finished) == 12
    assert listener.value("active") == 0 and listener.value("policy_failures_total") == 1
    assert listener.value("workflows", state="held") == 0


def test_a_fault_of_the_metrics_costs_the_metrics_only(monkeypatch):
    scheduler = make_scheduler("saga", blocks=60)
    monkeypatch.setattr(stats, "_calibration", lambda saga: 1 / 0)
    run_under_pressure(scheduler)
    assert scheduler.saga is not None and scheduler.saga_failures == 0


def test_without_somebody_to_take_them_out_no_reports_are_sent(monkeypatch):
    for variable, value in (("VLLM_PLUGINS", "other"), ("VLLM_USE_RUST_FRONTEND", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert not stats.is_heard()
            scheduler = make_scheduler("saga", blocks=100)
        Driver(scheduler).add(make_request("a", [5] * 64, 5, session_id="a"))
        scheduler.schedule()
        assert scheduler.make_stats().waiting_lora_adapters == {}
    monkeypatch.setenv("VLLM_PLUGINS", "saga,other")
    assert stats.is_heard()


def test_with_adapters_only_ours_is_taken_out():
    report = stats.Report({"active": {"": 1.0}}, {}, {"gap_seconds": {"": [0.5]}})
    sent = SchedulerStats()
    sent.waiting_lora_adapters["sql"] = 3
    stats.put(report, sent)
    assert stats.take(sent) == report
    assert sent.waiting_lora_adapters == {"sql": 3}
    assert stats.take(sent) is None


def logger_for(scheduler_cls) -> metrics.SagaStatLogger:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls),
        model_config=SimpleNamespace(served_model_name="model"),
    )
    return metrics.SagaStatLogger(vllm_config=config, engine_indexes=[0, 1])


@pytest.mark.parametrize(
    "scheduler_cls, ours",
    [
        ("saga", True), ("vllm_saga.SagaScheduler", True), (make_scheduler, True), (None, False),
        ("vllm.v1.core.sched.scheduler.Scheduler", False), (SchedulerStats, False),
    ],
)  # fmt: skip
def test_only_engines_that_run_saga_have_its_series(scheduler_cls, ours, monkeypatch):
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics.EngineMetrics.__init__, "__defaults__", (registry,), raising=True)
    logger_for(scheduler_cls).log_engine_initialized()
    text = generate_latest(registry).decode()
    assert (
        'vllm:saga_holds_total{engine="1",model_name="model",reason="no_room"} 0.0' in text
    ) is ours
    assert ours or not text


def test_a_report_that_makes_no_sense_does_not_end_the_output_loop(monkeypatch):
    monkeypatch.setattr(
        metrics.EngineMetrics.__init__, "__defaults__", (CollectorRegistry(),), raising=True
    )
    logger = logger_for("saga")
    for report in (stats.Report({"no such": {"": 1.0}}, {}, {}), stats.Report({}, {}, {})):
        sent = SchedulerStats()
        stats.put(report, sent)
        logger.record(sent, None, engine_idx=1)
    logger.record(None, None)


@given(
    st.lists(
        st.tuples(st.integers(0, 80), st.floats(0.0, 5.0), st.booleans()), min_size=1, max_size=60
    )
)
def test_tenants_are_bounded_and_their_sums_exact(charges):
    saga = SagaPolicy(SagaConfig(), 1000, 16)
    reporter = stats.Reporter()
    told: dict[str, float] = {}
    total = 0.0
    for number, (tenant, gpu_s, report_now) in enumerate(charges):
        saga.share.charge(f"t{tenant}", gpu_s, 0.0, float(number))
        total += gpu_s
        if report_now or number == len(charges) - 1:
            report = reporter.make(saga, {}, 0, float(number))
            for label, amount in report.counters.get(series.TENANT_GPU_S, {}).items():
                assert amount > 0.0
                told[label] = told.get(label, 0.0) + amount
    assert sum(told.values()) == pytest.approx(total)
    assert len(told) <= stats.MAX_TENANTS + 1


def test_a_tenant_known_by_its_cache_salt_goes_by_its_digest():
    saga = SagaPolicy(SagaConfig(), 1000, 16)
    saga.share.charge("secret", 1.0, 1.0, 0.0)
    report = stats.Reporter().make(saga, {}, 0, 0.0)
    names = {label for name in TENANT_METRICS for label in report.counters.get(name, {})}
    assert len(names) == 1 and names.pop().startswith("salt:")


def test_values_that_nobody_takes_are_bounded():
    tally = Tally()
    for _ in range(2 * MOST_VALUES):
        tally.see("gap_seconds", 1.0)
    assert len(tally.take()["gap_seconds", ""]) == MOST_VALUES
    assert tally.take() == {}


def test_names_follow_the_rules_of_prometheus():
    names = [each.name for each in series.ALL]
    assert len(set(names)) == len(names)
    for each in series.ALL:
        assert re.fullmatch(r"[a-z_]+", each.name) and not each.name.endswith("_total")
        assert each.label not in ("session", "workflow_id", "request")
        assert bool(each.buckets) == (each.kind == "histogram")
