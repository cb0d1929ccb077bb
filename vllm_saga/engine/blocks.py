"""RetentionQueue: vLLM's free-block queue, asked to spare what live workflows will want again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_saga.policy.retention import DEAD, SHARED, UNOWNED, KeepRank


class Owner(Protocol):
    """Whoever a cached block belongs to (a policy `Context`)."""

    dead: bool


class _Segment:
    """The free cached blocks of one owner, in the order they were freed (context tail first)."""

    __slots__ = ("blocks", "owner", "rank")

    def __init__(self, owner: Owner | None = None, rank: KeepRank = UNOWNED) -> None:
        self.owner = owner
        self.rank = rank
        self.blocks: OrderedDict[int, KVCacheBlock] = OrderedDict()


class RetentionQueue(FreeKVCacheBlockQueue):
    """Stock's LRU list, intact, with an index of who owns which block.

    Every block stays free and counted as free (no pins). Stock's choice stands unless it would
    evict a cached block of a live owner; only then another free block dies in its place: the first
    of the segment that ranks lowest (`keep_rank`, policy/retention.py). With no owner known this
    *is* stock's queue. Replaces `block_pool.free_block_queue` (vllm/v1/core/block_pool.py).

    Args:
        stock: the queue to take over; its blocks move here, in order.
        rank_of: the keep rank of an owner; called at most once per owner and step.
    """

    def __init__(self, stock: FreeKVCacheBlockQueue, rank_of: Callable[[Owner], KeepRank]) -> None:
        super().__init__(stock.get_all_free_blocks())
        self._rank_of = rank_of
        self._owner_of: dict[int, Owner | None] = {}
        self._shared_ids: set[int] = set()
        self._segment_of: dict[int, _Segment] = {}
        self._segments: dict[Owner, _Segment] = {}
        self._dead = _Segment(rank=DEAD)
        self._unowned = _Segment(rank=UNOWNED)
        self._shared = _Segment(rank=SHARED)
        self._victims: list[_Segment] | None = None

    # -- owners ---------------------------------------------------------------------------------

    def claim(self, blocks: Iterable[KVCacheBlock], owner: Owner) -> None:
        """`owner` used these blocks last; a block it shares with another live owner is shared.

        What the owner still has in the free list at this moment it did not use: superseded.
        """
        self._supersede(owner)
        owner_of = self._owner_of
        for block in blocks:
            before = owner_of.get(block.block_id)
            if before is not None and before is not owner and not before.dead:
                self._shared_ids.add(block.block_id)
            owner_of[block.block_id] = owner

    def new_epoch(self) -> None:
        """A scheduling step begins: owners may have changed rank."""
        self._victims = None

    def disown_all(self) -> None:
        """Forget every owner; the queue is stock's from here on until the next claim."""
        self._owner_of.clear()
        self._shared_ids.clear()
        self._segment_of.clear()
        for segment in (self._dead, self._unowned, self._shared, *self._segments.values()):
            segment.blocks.clear()
        self._segments.clear()
        self._victims = None

    @property
    def num_retained(self) -> int:
        """Free blocks that belong to live owners."""
        live = (s for owner, s in self._segments.items() if not owner.dead)
        return len(self._shared.blocks) + sum(len(segment.blocks) for segment in live)

    # -- FreeKVCacheBlockQueue ------------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        block = self.fake_free_list_head.next_free_block
        if not self._segments and not self._shared.blocks:
            block = super().popleft()
        elif block is not None and self._spared(block):
            block = self._victim() or block
            super().remove(block)
        else:
            block = super().popleft()
        self._forget(block)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        if self._segments or self._shared.blocks:
            return [self.popleft() for _ in range(n)]
        blocks = super().popleft_n(n)
        for block in blocks:
            self._forget(block)
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        super().remove(block)
        self._unindex(block)

    def append(self, block: KVCacheBlock) -> None:
        super().append(block)
        self._index(block)

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        super().append_n(blocks)
        for block in blocks:
            self._index(block)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        super().prepend_n(blocks)
        for block in blocks:
            self._owner_of.pop(block.block_id, None)

    # -- inside ---------------------------------------------------------------------------------

    def _spared(self, block: KVCacheBlock) -> bool:
        """Whether stock's choice is a cached block that a live owner may want again."""
        segment = self._segment_of.get(block.block_id)
        if segment is None:
            return False
        return segment is self._shared or (segment.owner is not None and not segment.owner.dead)

    def _victim(self) -> KVCacheBlock | None:
        """The free block that is worth least; None if the index knows of none."""
        if self._dead.blocks:
            return next(iter(self._dead.blocks.values()))
        if self._victims is None:
            owned = list(self._segments.items())
            for owner, segment in owned:
                segment.rank = self._rank_of(owner)
            self._victims = [self._unowned, self._shared, *(segment for _, segment in owned)]
            self._victims.sort(key=lambda segment: segment.rank, reverse=True)
        while self._victims:
            segment = self._victims[-1]
            if segment.blocks:
                return next(iter(segment.blocks.values()))
            self._victims.pop()
        return None

    def _supersede(self, owner: Owner) -> None:
        segment = self._segments.pop(owner, None)
        if segment is None:
            return
        for block_id, block in segment.blocks.items():
            self._segment_of[block_id] = self._dead
            self._dead.blocks[block_id] = block
            self._owner_of[block_id] = None
        # This step's ranking may still list the segment.
        segment.blocks.clear()

    def _index(self, block: KVCacheBlock) -> None:
        block_id = block.block_id
        if block.block_hash is None:
            return
        owner = self._owner_of.get(block_id)
        if owner is None:
            segment = self._unowned
        elif block_id in self._shared_ids:
            segment = self._shared
        else:
            found = self._segments.get(owner)
            if found is None:
                found = self._segments[owner] = _Segment(owner)
            segment = found
        self._segment_of[block_id] = segment
        segment.blocks[block_id] = block

    def _unindex(self, block: KVCacheBlock) -> None:
        segment = self._segment_of.pop(block.block_id, None)
        if segment is not None:
            del segment.blocks[block.block_id]
            if not segment.blocks and segment.owner is not None:
                self._segments.pop(segment.owner, None)

    def _forget(self, block: KVCacheBlock) -> None:
        """The block is handed out for other content."""
        self._unindex(block)
        self._owner_of.pop(block.block_id, None)
        self._shared_ids.discard(block.block_id)
