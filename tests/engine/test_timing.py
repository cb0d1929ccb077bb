"""What the scheduler learns of its engine's steps, on the real schedulers."""

from __future__ import annotations

import msgspec
import pytest

from vllm_saga.simulator import policies
from vllm_saga.simulator.cluster import Cluster, Setup
from vllm_saga.simulator.hardware import Hardware, Linear
from vllm_saga.simulator.placement import PLACEMENTS
from vllm_saga.simulator.trace import Call, Session

MACHINE = Hardware(
    name="small",
    source="made up",
    kv_tokens=20_000,
    max_num_seqs=16,
    max_num_batched_tokens=512,
    cost=Linear(base_s=0.01, token_s=1e-4, pair_s=2e-8, kv_token_s=1e-6),
)


def session(number):
    calls, context = [], 0
    for step in range(6):
        new = 300 + 150 * ((number + step) % 7)
        calls.append(Call(context + new, new, 20 + 3 * number, tool_latency_s=0.2, gap="tool"))
        context += new + calls[-1].output_tokens
    return Session(f"s{number}", tuple(calls))


def test_tokens_that_cost_nothing_are_learned():
    cost = Linear(base_s=0.002, token_s=2e-4, pair_s=2e-8, kv_token_s=1e-6, free_tokens=100)
    machine = msgspec.structs.replace(MACHINE, cost=cost, max_num_batched_tokens=2048)
    sessions = [session(number) for number in range(60)]
    cluster = Cluster(
        Setup(sessions, machine, PLACEMENTS["least_loaded"], lanes=6), policies.maker("saga")
    )
    cluster.run()
    fit = cluster.replicas[0].scheduler.saga.cost.fit
    assert 80 <= fit.free_tokens <= 110
    assert fit.kv_s == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("overlapping", [True, False])
@pytest.mark.parametrize("cruises", [True, False])
def test_prefill_seconds_are_learned(overlapping, cruises):
    sessions = [session(number) for number in range(12)]
    setup = Setup(
        sessions, MACHINE, PLACEMENTS["least_loaded"], lanes=6, overlapping=overlapping,
        cruises=cruises,
    )  # fmt: skip
    cluster = Cluster(setup, policies.maker("saga"))
    cluster.run()
    cost = cluster.replicas[0].scheduler.saga.cost
    assert cost.known
    for tokens in (1_000, 4_000):
        true = 1e-4 * tokens + 2e-8 * tokens * tokens / 2
        assert cost.prefill_s(tokens) == pytest.approx(true, rel=0.2)
    assert 0.0 < cost.spare < 1.0
    # Every token costs on this machine, so no prefill is paced.
    assert cost.fit.free_tokens == 0
