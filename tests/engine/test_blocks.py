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


def rank_owners(owners):
    return [(0, 0.0) if owner.dead else owner.rank for owner in owners]


def make(count, cached=True):
    blocks = [KVCacheBlock(index) for index in range(count)]
    for block in blocks:
        if cached:
            block._block_hash = b"h%d" % block.block_id
    return blocks, RetentionQueue(FreeKVCacheBlockQueue(blocks), rank_owners)


def take(queue, count):
    blocks = queue.popleft_n(count)
    for block in blocks:
        block._block_hash = b"h%d" % block.block_id
    return blocks


def check(queue, blocks, outside):
    """The list holds every free block once, and the notes agree with each other and with it."""
    free = queue.get_all_free_blocks()
    assert len(free) == queue.num_free_blocks == len(blocks) - len(outside)
    assert {b.block_id for b in free} == {b.block_id for b in blocks} - outside
    claims = [queue._shared_claim, *queue._claims.values()]
    for claim in claims:
        mine = {i for i, other in queue._claim_of.items() if other is claim}
        assert claim.left == len(mine)
        assert claim is queue._shared_claim or mine <= {b.block_id for b in claim.blocks}
    assert all(claim.left for claim in claims[1:])
    assert sum(claim.left for claim in claims) == len(queue._claim_of)
    assert set(queue._shared) == {
        i for i, claim in queue._claim_of.items() if claim is queue._shared_claim
    }
    for block in free:
        if block.block_hash is not None and block.block_id not in queue._claim_of:
            assert block.block_id in queue._loose


@settings(max_examples=100)
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


def test_order_dead_unowned_stale_waiting_resident():
    blocks, queue = make(14)
    take(queue, 14)
    resident, waiting, stale, dead, other = (
        Agent((6, -1.0)),
        Agent((4, -9.0)),
        Agent((2, 4.0)),
        Agent(),
        Agent((4, -1.0)),
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
    assert pop_ids(queue, 6) == [5, 4, 3, 2, 1, 0]


def test_what_contexts_begin_with_outlives_the_rest_of_each():
    blocks, queue = make(8)
    take(queue, 8)
    young, old, gone = Agent((6, -2.0)), Agent((6, -1.0)), Agent()
    used_by(queue, blocks, old, [0, 1, 2, 3])
    for owner, own in ((young, [4, 5]), (gone, [6, 7])):
        queue.remove(blocks[0])
        queue.remove(blocks[1])
        used_by(queue, blocks, owner, [0, 1, *own])
    gone.dead = True
    queue.new_epoch()
    assert pop_ids(queue, 8) == [7, 6, 5, 4, 3, 2, 1, 0]


def test_contexts_of_one_rank_keep_their_beginning_to_the_last():
    blocks, queue = make(6)
    take(queue, 6)
    one, other = Agent((6, -1.0)), Agent((6, -1.0))
    used_by(queue, blocks, one, [0, 1, 2, 3])
    for index in (0, 1):
        queue.remove(blocks[index])
    used_by(queue, blocks, other, [0, 1, 4, 5])
    queue.new_epoch()
    assert pop_ids(queue, 6) == [5, 4, 3, 2, 1, 0]


def test_what_only_the_dead_shared_goes_before_residents():
    blocks, queue = make(6)
    take(queue, 6)
    resident, *gone = Agent((6, 0.0)), Agent(), Agent()
    used_by(queue, blocks, resident, [4, 5])
    used_by(queue, blocks, gone[0], [0, 1, 2])
    for index in (0, 1):
        queue.remove(blocks[index])
    used_by(queue, blocks, gone[1], [0, 1, 3])
    for owner in gone:
        owner.dead = True
    queue.new_epoch()
    assert pop_ids(queue, 6) == [3, 2, 1, 0, 5, 4]


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
    assert queue.num_free_blocks == 8
    queue.disown_all()
    assert pop_ids(queue, 8) == list(range(7, -1, -1))


def test_a_block_handed_out_and_used_again_at_its_old_place_has_an_owner_again():
    blocks, queue = make(4)
    take(queue, 4)
    agent = Agent((5, 0.0))
    used_by(queue, blocks, agent, [0, 1, 2])
    assert pop_ids(queue, 1) == [2]
    blocks[2]._block_hash = b"again"
    queue.remove(blocks[0])
    queue.remove(blocks[1])
    used_by(queue, blocks, agent, [0, 1, 2])
    queue.append(blocks[3])
    queue.new_epoch()
    # Stock would take 2 first.
    assert pop_ids(queue, 4) == [3, 2, 1, 0]


def test_freeing_and_using_owned_blocks_again_leaves_the_notes_alone():
    blocks, queue = make(4)
    take(queue, 4)
    one, other = Agent((5, 0.0)), Agent((5, 1.0))
    used_by(queue, blocks, one, [0, 1])
    queue.remove(blocks[0])
    used_by(queue, blocks, other, [0, 2])
    queue.remove(blocks[0])
    queue.remove(blocks[1])
    used_by(queue, blocks, one, [0, 1])
    assert set(queue._shared) == {0}
    assert queue._claims[one].left == queue._claims[other].left == 1
