"""Prefix cache lookups that go on from the last one of the same request.

vLLM looks a waiting request's prefix up again at every step until there is room for it: with long
contexts most of a simulation's time. What it finds is the same until one of the blocks found is
evicted or cached again, or the first one missing is cached; so it is enough to note which hashes
changed in between.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import (
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

# Requests, and changes, that are remembered.
_REQUESTS = 256
_CHANGES = 65_536


class _NotedMap(BlockHashToBlockMap):
    """vLLM's map of cached blocks, with the hashes that changed; `forgotten` of them are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[Any] = []
        self.forgotten = 0

    @property
    def changes(self) -> int:
        return self.forgotten + len(self.changed)

    def insert(self, key: Any, block: KVCacheBlock) -> None:
        self._note(key)
        super().insert(key, block)

    def pop(self, key: Any, block_id: int) -> KVCacheBlock | None:
        self._note(key)
        popped: KVCacheBlock | None = super().pop(key, block_id)
        return popped

    def _note(self, key: Any) -> None:
        if len(self.changed) >= _CHANGES:
            self.forgotten += len(self.changed)
            self.changed.clear()
        self.changed.append(key)


@dataclass(slots=True)
class _Found:
    """What a request's last lookup found: blocks, where in its prefix, after so many changes."""

    hashes: Any
    blocks: list[KVCacheBlock] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)
    changes: int = 0


class Lookups:
    """`UnitaryKVCacheCoordinator.find_longest_cache_hit` for full attention, same results."""

    def __init__(self, coordinator: Any) -> None:
        self._pool = coordinator.block_pool
        self._block_size = coordinator.block_size
        self._stock = coordinator.find_longest_cache_hit
        self._map = self._pool.cached_block_hash_to_block = _NotedMap()
        self._found: OrderedDict[int, _Found] = OrderedDict()

    def find_longest_cache_hit(self, block_hashes: Any, max_cache_hit_length: int) -> Any:
        if self._pool.cached_block_hash_to_block is not self._map:
            return self._stock(block_hashes, max_cache_hit_length)  # the cache was reset
        found = self._last(block_hashes)
        blocks, get = found.blocks, self._map.get_one_block
        limit = max_cache_hit_length // self._block_size
        for block_hash in block_hashes[len(blocks) : limit]:
            key = make_block_hash_with_group_id(block_hash, 0)
            block = get(key)
            if block is None:
                break
            found.places[key] = len(blocks)
            blocks.append(block)
        hit = blocks[:limit]
        return (hit,), len(hit) * self._block_size, 0

    def evictable_before(self, block_hashes: Any, at_most: int) -> int:
        """So many blocks can be taken from the pool before one that the last lookup has found."""
        found = self._found.get(id(block_hashes))
        queue = self._pool.free_block_queue
        if found is None or type(queue) is not FreeKVCacheBlockQueue:
            return 0
        block = queue.fake_free_list_head.next_free_block
        for count in range(at_most):
            if block is None or block.block_hash in found.places:
                return count
            block = block.next_free_block
        return at_most

    def _last(self, block_hashes: Any) -> _Found:
        """What of the request's last lookup still stands."""
        found = self._found.pop(id(block_hashes), None)
        noted = self._map
        if found is None or found.hashes is not block_hashes or found.changes < noted.forgotten:
            found = _Found(block_hashes)
        else:
            places, stands = found.places, len(found.blocks)
            for key in noted.changed[found.changes - noted.forgotten :]:
                stands = min(stands, places.get(key, stands))
            del found.blocks[stands:]
        found.changes = noted.changes
        self._found[id(block_hashes)] = found
        if len(self._found) > _REQUESTS:
            self._found.popitem(last=False)
        return found


def install(scheduler: Any) -> Lookups | None:
    """Have a scheduler that has not begun use them, if its model has plain full attention."""
    coordinator = scheduler.kv_cache_manager.coordinator
    if (
        type(coordinator) is not UnitaryKVCacheCoordinator
        or type(coordinator.single_type_managers[0]) is not FullAttentionManager
    ):
        return None
    lookups = Lookups(coordinator)
    coordinator.find_longest_cache_hit = lookups.find_longest_cache_hit
    return lookups
