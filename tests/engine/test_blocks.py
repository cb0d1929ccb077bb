"""RetentionQueue: stock's queue when nothing is known, no block lost or pinned when much is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_saga.engine.blocks import RetentionQueue


class Agent:
    def __init__(self, rank=(3, 0.0)):
        self.dead = False
        self.rank = rank


def rank_of(owner):
    return (0, 0.0) if owner.dead else owner.rank


def make(count, cached=True):
    blocks = [KVCacheBlock(index) for index in range(count)]
    for block in blocks:
        if cached:
            block._block_hash = b"h%d" % block.block_id
    return blocks, RetentionQueue(FreeKVCacheBlockQueue(blocks), rank_of)


def take(queue, count):
    blocks = queue.popleft_n(count)
    for block in blocks:
        block._block_hash = b"h%d" % block.block_id
    return blocks


def check(queue, blocks, outside):
    """The index and the list hold the same blocks, each once."""
    free = queue.get_all_free_blocks()
    assert len(free) == queue.num_free_blocks == len(blocks) - len(outside)
    assert {b.block_id for b in free} == {b.block_id for b in blocks} - outside
    segments = [queue._dead, queue._unowned, queue._shared, *queue._segments.values()]
    indexed = [block_id for segment in segments for block_id in segment.blocks]
    assert len(indexed) == len(set(indexed))
    assert set(indexed) == set(queue._segment_of)
    assert set(indexed) <= {b.block_id for b in free}


@settings(max_examples=100, deadline=None)
@given(st.integers(0), st.booleans())
def test_random_use_loses_no_block_and_is_stock_without_owners(seed, owners):
    rng = random.Random(seed)
    blocks, queue = make(40)
    twins = [KVCacheBlock(index) for index in range(40)]
    stock = FreeKVCacheBlockQueue(twins)
    agents = [Agent((rng.choice([2, 3, 5]), float(i))) for i in range(4)]
    outside: set[int] = set()
    for _ in range(80):
        kind = rng.choice(["pop", "pop", "free", "free", "unhashed", "touch", "die", "epoch"])
        if kind == "pop":
            n = rng.randrange(queue.num_free_blocks + 1)
            popped = [b.block_id for b in take(queue, n)]
            outside |= set(popped)
            if not owners:
                assert popped == [b.block_id for b in stock.popleft_n(n)]
        elif kind in ("free", "unhashed") and outside:
            ids = rng.sample(sorted(outside), rng.randrange(1, len(outside) + 1))
            outside -= set(ids)
            if kind == "free":
                if owners:
                    queue.claim((blocks[i] for i in ids), rng.choice(agents))
                queue.append_n([blocks[i] for i in ids])
                stock.append_n([twins[i] for i in ids]) if not owners else None
            else:
                for i in ids:
                    blocks[i]._block_hash = None
                queue.prepend_n([blocks[i] for i in ids])
                stock.prepend_n([twins[i] for i in ids]) if not owners else None
        elif kind == "touch" and queue.num_free_blocks:
            block = rng.choice(queue.get_all_free_blocks())
            queue.remove(block)
            stock.remove(twins[block.block_id]) if not owners else None
            outside.add(block.block_id)
        elif kind == "die":
            rng.choice(agents).dead = rng.random() < 0.5
        else:
            queue.new_epoch()
        check(queue, blocks, outside)
    take(queue, queue.num_free_blocks)
    assert queue.num_free_blocks == 0
    with pytest.raises(ValueError):
        queue.popleft()


def used_by(queue, blocks, owner, ids):
    chosen = [blocks[i] for i in ids]
    queue.claim(chosen, owner)
    queue.append_n(chosen[::-1])


def pop_ids(queue, count):
    return [queue.popleft().block_id for _ in range(count)]


def test_order_dead_unowned_stale_waiting_shared_resident():
    blocks, queue = make(14)
    take(queue, 14)
    resident, waiting, stale, dead, other = (
        Agent((5, -1.0)),
        Agent((3, -9.0)),
        Agent((2, 4.0)),
        Agent(),
        Agent((3, -1.0)),
    )
    used_by(queue, blocks, resident, [0, 1, 2, 3])
    for block in queue.get_all_free_blocks()[-2:]:
        queue.remove(block)
    used_by(queue, blocks, other, [0, 1])
    used_by(queue, blocks, waiting, [4, 5])
    used_by(queue, blocks, stale, [6, 7])
    used_by(queue, blocks, dead, [8, 9])
    dead.dead = True
    queue.append_n([blocks[10], blocks[11]])
    queue.new_epoch()
    # Stock would take the resident's first; its blocks go last, context tail first.
    assert pop_ids(queue, 6) == [9, 8, 10, 11, 7, 6]
    assert pop_ids(queue, 6) == [5, 4, 1, 0, 3, 2]


def test_stock_s_choice_stands_while_no_live_owner_would_lose():
    blocks, queue = make(6)
    take(queue, 6)
    queue.append_n([blocks[3], blocks[1]])
    used_by(queue, blocks, Agent((5, 0.0)), [0])
    dead = Agent()
    used_by(queue, blocks, dead, [2])
    dead.dead = True
    assert pop_ids(queue, 4) == [3, 1, 2, 0]


def test_what_the_owner_did_not_use_again_is_superseded():
    blocks, queue = make(6)
    take(queue, 6)
    agent, neighbour = Agent((5, -1.0)), Agent((3, -2.0))
    used_by(queue, blocks, neighbour, [4])
    used_by(queue, blocks, agent, [0, 1, 2, 3])
    queue.remove(blocks[0])
    queue.remove(blocks[1])
    used_by(queue, blocks, agent, [0, 1, 5])
    queue.new_epoch()
    assert set(pop_ids(queue, 2)) == {2, 3}
    assert pop_ids(queue, 1) == [4]


def test_an_owner_nobody_ranked_this_step_can_still_be_evicted():
    blocks, queue = make(4)
    take(queue, 4)
    first, second = Agent((5, 0.0)), Agent((5, 1.0))
    used_by(queue, blocks, first, [0, 1])
    assert len(pop_ids(queue, 1)) == 1
    used_by(queue, blocks, second, [2, 3])
    assert len(pop_ids(queue, 3)) == 3
    assert queue.num_free_blocks == 0


def test_no_pins_retained_blocks_are_free_blocks():
    blocks, queue = make(8)
    take(queue, 8)
    used_by(queue, blocks, Agent((5, 0.0)), range(8))
    assert queue.num_retained == queue.num_free_blocks == 8
    queue.disown_all()
    assert queue.num_retained == 0
    assert pop_ids(queue, 8) == list(range(7, -1, -1))
