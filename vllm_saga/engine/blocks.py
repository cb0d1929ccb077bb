"""RetentionQueue: vLLM's free-block queue, asked to spare what live workflows will want again."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from operator import is_not, itemgetter
from typing import Protocol

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_saga.policy.retention import SHARED, UNOWNED, KeepRank


class Owner(Protocol):
    """Whoever a cached block belongs to (a policy `Context`)."""

    dead: bool


class _Anyone:
    """The owner of what several live owners share."""

    dead = False


class _Claim:
    """What one owner used last: `blocks` from the root of its context to its tail.

    `left` of them are still its own; `lost` says that one was handed out for other content.
    """

    __slots__ = ("blocks", "left", "lost", "owner", "shared_lost")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.blocks: list[KVCacheBlock] = []
        self.left = 0
        self.lost = False
        self.shared_lost = 0


class RetentionQueue(FreeKVCacheBlockQueue):
    """Stock's LRU list, intact, with a note of who used which block last.

    Every block stays free and counted as free (no pins). Stock's choice stands unless it would
    evict a cached block of a live owner; only then another free block dies in its place: one that
    ranks lowest (policy/retention), tail of a context first. With no owner known
    this *is* stock's queue. Replaces `block_pool.free_block_queue` (vllm/v1/core/block_pool.py).

    Freeing and touching owned blocks costs nothing beyond stock: whether a noted block is free is
    asked only when a victim is needed.

    Args:
        stock: the queue to take over; its blocks move here, in order.
        rank_owners: the keep ranks of owners; asked once per epoch, and again if it runs out of
            victims among the owners it knew.
    """

    def __init__(
        self,
        stock: FreeKVCacheBlockQueue,
        rank_owners: Callable[[Sequence[Owner]], Sequence[KeepRank]],
    ) -> None:
        super().__init__(stock.get_all_free_blocks())
        self._rank_owners = rank_owners
        self._claims: dict[Owner, _Claim] = {}
        self._claim_of: dict[int, _Claim] = {}
        # Free cached blocks of nobody: superseded ones, then LRU. Entries may be out of date.
        self._loose: OrderedDict[int, KVCacheBlock] = OrderedDict()
        self._shared_claim = _Claim(_Anyone())
        self._shared: OrderedDict[int, KVCacheBlock] = OrderedDict()
        self._shared_lost = 0
        self._finders: list[Callable[[], KVCacheBlock | None]] | None = None
        # In this epoch: claims, who is evicted last first; and who keeps each shared block.
        self._order: list[_Claim] = []
        self._keepers: dict[int, _Claim] | None = None
        self._claimed = False
        self._note_loose(self.get_all_free_blocks())

    # -- owners ---------------------------------------------------------------------------------

    def claim(self, blocks: Iterable[KVCacheBlock], owner: Owner) -> None:
        """`owner` used these blocks last; a block it has in common with a live owner is shared.

        What it used before and did not use now is superseded. Call before the blocks are freed.
        """
        self._claimed = True
        used = list(blocks)
        while used and used[-1].block_hash is None:
            used.pop()
        claim = self._claims.get(owner)
        if claim is None:
            claim = self._claims[owner] = _Claim(owner)
        before, claim.blocks = claim.blocks, used
        if claim.lost or claim.shared_lost != self._shared_lost:
            changed = list(range(len(used)))
        else:
            # A context grows: its leading blocks are the same, and noted already.
            common = min(len(before), len(used))
            moved = compress(range(common), map(is_not, before, used))
            changed = [*moved, *range(common, len(used))]
        claim.lost, claim.shared_lost = False, self._shared_lost
        # Tail first, the order in which blocks of a context die.
        for index in reversed(changed):
            self._own(used[index], claim)
        if len(changed) > len(used) - len(before):
            self._supersede(claim, before)
        if not claim.left:
            del self._claims[owner]

    def new_epoch(self) -> None:
        """Owners may have changed rank."""
        self._finders = None

    def disown_all(self) -> None:
        """Forget every owner; the queue is stock's from here on until the next claim."""
        self._claims.clear()
        self._claim_of.clear()
        self._loose.clear()
        self._shared.clear()
        self._shared_claim.left = 0
        self._finders, self._order, self._keepers = None, [], None

    # -- FreeKVCacheBlockQueue ------------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        block = self.fake_free_list_head.next_free_block
        if block is not None and self._spared(block):
            block = self._victim() or block
            super().remove(block)
        else:
            block = super().popleft()
        self._forget(block)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        if self._claim_of:
            return [self.popleft() for _ in range(n)]
        return super().popleft_n(n)

    def append(self, block: KVCacheBlock) -> None:
        super().append(block)
        self._note_loose((block,))

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        super().append_n(blocks)
        self._note_loose(blocks)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        super().prepend_n(blocks)
        for block in blocks:
            self._forget(block)

    # -- inside: who owns what ------------------------------------------------------------------

    def _own(self, block: KVCacheBlock, claim: _Claim) -> None:
        block_id = block.block_id
        before = self._claim_of.get(block_id)
        if before is claim or before is self._shared_claim:
            return
        if before is not None:
            self._drop(before)
            if not before.owner.dead:
                claim = self._shared_claim
                self._shared[block_id] = block
        self._claim_of[block_id] = claim
        claim.left += 1

    def _supersede(self, claim: _Claim, before: list[KVCacheBlock]) -> None:
        kept = {block.block_id for block in claim.blocks}
        for block in before:
            block_id = block.block_id
            if block_id not in kept and self._claim_of.get(block_id) is claim:
                del self._claim_of[block_id]
                claim.left -= 1
                self._loose[block_id] = block
                self._loose.move_to_end(block_id, last=False)

    def _forget(self, block: KVCacheBlock) -> None:
        """The block is handed out for other content."""
        claim = self._claim_of.pop(block.block_id, None)
        if claim is None:
            return
        claim.lost = True
        if claim is self._shared_claim:
            self._shared_lost += 1
            del self._shared[block.block_id]
        self._drop(claim)

    def _drop(self, claim: _Claim) -> None:
        claim.left -= 1
        if not claim.left:
            self._claims.pop(claim.owner, None)

    def _note_loose(self, blocks: Iterable[KVCacheBlock]) -> None:
        claim_of = self._claim_of
        for block in blocks:
            if block.block_id not in claim_of and block.block_hash is not None:
                self._loose[block.block_id] = block
                self._loose.move_to_end(block.block_id)

    # -- inside: who dies -----------------------------------------------------------------------

    def _spared(self, block: KVCacheBlock) -> bool:
        """Whether stock's choice is a cached block that a live owner may want again."""
        claim = self._claim_of.get(block.block_id)
        return claim is not None and not claim.owner.dead and block.block_hash is not None

    def _victim(self) -> KVCacheBlock | None:
        """The free block that is worth least; None if no note leads to one."""
        block = self._first_found()
        if block is None and self._claimed:
            self._finders = None
            block = self._first_found()
        return block

    def _first_found(self) -> KVCacheBlock | None:
        if self._finders is None:
            self._finders = self._ranked_finders()
            self._claimed = False
        while self._finders:
            block = self._finders[-1]()
            if block is not None:
                return block
            self._finders.pop()
        return None

    def _ranked_finders(self) -> list[Callable[[], KVCacheBlock | None]]:
        """Where to look for a victim in this epoch: last entry first."""
        claims = list(self._claims.values())
        ranks = self._rank_owners([claim.owner for claim in claims])
        ranked: list[tuple[KeepRank, _Claim | None, Callable[[], KVCacheBlock | None]]] = [
            (UNOWNED, None, self._find_loose),
            (SHARED, None, self._find_shared),
        ]
        ranked += [
            (rank, claim, partial(self._find_owned, claim))
            for rank, claim in zip(ranks, claims, strict=True)
        ]
        ranked.sort(key=itemgetter(0), reverse=True)
        self._order = [claim for _, claim, _ in ranked if claim is not None]
        self._keepers = None
        return [find for _, _, find in ranked]

    def _find_loose(self) -> KVCacheBlock | None:
        while self._loose:
            block_id, block = next(iter(self._loose.items()))
            if _is_free(block) and block_id not in self._claim_of:
                return block
            del self._loose[block_id]
        return None

    def _find_shared(self) -> KVCacheBlock | None:
        """A shared block of which no context is left."""
        for _ in range(len(self._shared)):
            block_id, block = next(iter(self._shared.items()))
            if _is_free(block) and block_id not in self._kept_by():
                return block
            self._shared.move_to_end(block_id)
        return None

    def _find_owned(self, claim: _Claim) -> KVCacheBlock | None:
        blocks, shared = claim.blocks, self._shared_claim
        while blocks:
            block = blocks[-1]
            holder = self._claim_of.get(block.block_id)
            if holder is claim or holder is shared:
                break
            blocks.pop()
        else:
            return None
        if holder is shared and self._kept_by().get(block.block_id) is not claim:
            # Another context that is kept for longer begins with it, and with all before it.
            return None
        # A tail in use means that the whole context is.
        return block if _is_free(block) else None

    def _kept_by(self) -> dict[int, _Claim]:
        """Of the contexts that begin with a shared block, the one that is evicted last, by block:
        without its beginning nothing of a context is of use.
        """
        if self._keepers is None:
            self._keepers = {}
            for claim in self._order:
                if not claim.owner.dead:
                    self._keep_shared(claim, self._keepers)
        return self._keepers

    def _keep_shared(self, claim: _Claim, keepers: dict[int, _Claim]) -> None:
        """Note the blocks that `claim` shares and nobody keeps for longer."""
        blocks, shared = claim.blocks, self._shared_claim
        # What is shared is a leading part.
        end = bisect_left(
            blocks, True, key=lambda block: self._claim_of.get(block.block_id) is not shared
        )
        for block in reversed(blocks[:end]):
            if block.block_id in keepers:
                return
            keepers[block.block_id] = claim


def _is_free(block: KVCacheBlock) -> bool:
    return block.next_free_block is not None
