"""Small makers for policy tests: contexts as chains of made-up block hashes."""

from __future__ import annotations

import pytest

from vllm_saga.config import SagaConfig
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.stepfit import Step
from vllm_saga.policy.workflow import Arrival

BLOCK = 4


def make_policy(pool_blocks: int = 100, **knobs: object) -> SagaPolicy:
    # To compute a test's few tokens again costs nothing: all pools would be overdrawn.
    config = SagaConfig.model_validate({"overdraft": 0.0, **knobs})
    return SagaPolicy(config, pool_blocks, BLOCK)


def learn_costs(policy: SagaPolicy) -> None:
    """10,000 tokens of prefill a second."""
    for _ in range(200):
        policy.cost.observe(Step(100, 5000, 100), 0.01, 0.01)


def prompt(seed: int, blocks: int) -> list[int]:
    """Tokens that share nothing with those of another seed."""
    return [seed * 1000 + i for i in range(blocks * BLOCK)]


def chain_of(tokens: list[int]) -> list[int]:
    """One hash for each full block, chained as vLLM's are."""
    hashes: list[int] = []
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        previous = hashes[-1] if hashes else 0
        hashes.append(hash((previous, tuple(tokens[end - BLOCK : end]))))
    return hashes


def arrival(call_id: str, tokens: list[int], session: str | None = None, **fields: object):
    return Arrival(
        call_id=call_id,
        chain=chain_of(tokens),
        prompt_tokens=len(tokens),
        tokens=tokens,
        session_id=session,
        **fields,  # type: ignore[arg-type]
    )


def run_call(
    policy: SagaPolicy, call: Arrival, output: list[int], now: float, until: float | None = None
) -> list[int]:
    """A call that runs at once from `now` to `until`; returns its whole context."""
    policy.on_arrival(call, now)
    assert not policy.is_held(call.call_id)
    tokens = [*call.tokens, *output]
    call.chain.extend(chain_of(tokens)[len(call.chain) :])
    policy.on_finish(call.call_id, len(tokens), until if until is not None else now)
    return tokens


def check_integrity(policy: SagaPolicy) -> None:
    """What must be true between any two events."""
    residency = policy.residency
    for workflow in residency.residents:
        assert workflow.resident and not workflow.held and not workflow.stale
    workflows = {session.workflow for session in policy.table.sessions.values()}
    workflows |= {call.context.session.workflow for call in policy.calls.values()}
    assert residency.held_workflows == sum(bool(w.held) for w in workflows)
    assert residency.held_calls == sum(len(w.held) for w in workflows)
    counted = set()
    for workflow in workflows:
        assert workflow.resident == (workflow in residency.residents)
        for context in workflow.contexts():
            assert not context.dead
            assert context.counted <= len(context.chain)
            assert workflow.resident or not context.counted
            counted |= set(context.chain[: context.counted])
    assert len(residency.ledger) == len(counted)
    parts = sum(residency.ledger.part_of(c) for w in workflows for c in w.contexts())
    assert parts == pytest.approx(len(counted))
    promised = sum(w.next_blocks for w in residency.residents)
    loose = sum(call.loose_blocks for call in policy.calls.values())
    assert residency.loose_blocks == loose
    assert residency.used_blocks == len(counted) + promised + loose
    idle = {w for w in workflows if not w.calls}
    assert idle == set(policy.table.idle)
