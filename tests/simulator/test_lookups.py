"""Lookups that go on from the last one find what vLLM's own find."""

from __future__ import annotations

import random

import pytest
from agents import SMALL, many
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id

from vllm_saga.simulator import lookups, runner
from vllm_saga.simulator.cluster import Setup
from vllm_saga.simulator.placement import PLACEMENTS


def outcome(policy):
    setup = Setup(
        many(16, output=60, group="agents"), SMALL, PLACEMENTS["sticky"], lanes=14, cruises=True
    )
    result = runner.run_setup(setup, policy)
    return [(c.id, c.first_token_s, c.finished_s, c.cached_tokens) for c in result.calls]


@pytest.mark.parametrize("policy", ["vllm", "farthest-next-use", "saga"])
def test_runs_are_the_same_to_the_last_bit(policy, monkeypatch):
    remembering = outcome(policy)
    monkeypatch.setattr(lookups, "install", lambda scheduler: None)
    assert outcome(policy) == remembering


class _Pool:
    cached_block_hash_to_block = None


class _Coordinator:
    """Looks up as vLLM does, in whatever map the pool has."""

    def __init__(self):
        self.block_pool, self.block_size = _Pool(), 4

    def find_longest_cache_hit(self, hashes, most):
        blocks = []
        for block_hash in hashes[: most // self.block_size]:
            key = make_block_hash_with_group_id(block_hash, 0)
            block = self.block_pool.cached_block_hash_to_block.get_one_block(key)
            if block is None:
                break
            blocks.append(block)
        return (blocks,), len(blocks) * self.block_size, 0


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_changes(seed, monkeypatch):
    monkeypatch.setattr(lookups, "_CHANGES", 40)
    monkeypatch.setattr(lookups, "_REQUESTS", 2)
    rng, coordinator = random.Random(seed), _Coordinator()
    stock, ours = coordinator.find_longest_cache_hit, lookups.Lookups(coordinator)
    requests = [[bytes([owner, place]) for place in range(12)] for owner in range(3)]
    # Two requests share a prefix.
    requests.append(requests[0][:6] + [bytes([9, place]) for place in range(6)])
    table = coordinator.block_pool.cached_block_hash_to_block
    cached, longest = {}, 0
    for block_id in range(2000):
        key = make_block_hash_with_group_id(rng.choice(rng.choice(requests)), 0)
        if rng.random() < 0.7:
            cached[block_id] = key
            table.insert(key, KVCacheBlock(block_id))
        elif cached:
            gone = rng.choice(list(cached))
            table.pop(cached.pop(gone), gone)
        hashes, most = rng.choice(requests), rng.choice([48, 47, 20])
        found = ours.find_longest_cache_hit(hashes, most)
        assert found == stock(hashes, most)
        longest = max(longest, found[1])
    assert longest >= 40
