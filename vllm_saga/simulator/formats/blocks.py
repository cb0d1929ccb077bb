"""What equal block hashes say about shared prefixes.

A trace that carries hashes gives every prompt a list of ids, one for each block of tokens. Two
prompts share exactly the blocks at which their lists agree from the front.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vllm_saga.simulator.trace import SharedPrefix


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists have in common at the front."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixTree:
    """Prefixes of id lists, each with a number; 0 is the empty one."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}
        self.uses: Counter[int] = Counter()

    def add(self, ids: Sequence[int]) -> None:
        """Count a list as one more use of all its prefixes."""
        node = 0
        for block in ids:
            node = self._children.setdefault((node, block), len(self._children) + 1)
            self.uses[node] += 1

    def path(self, ids: Sequence[int]) -> list[int]:
        """The prefixes of a list, shortest first, as far as they have been added."""
        nodes = []
        node = 0
        for block in ids:
            node = self._children.get((node, block), 0)
            if not node:
                break
            nodes.append(node)
        return nodes


def shared_prefixes(
    prompts: Sequence[tuple[Sequence[int], int]], block_size: int
) -> list[SharedPrefix | None]:
    """For each (ids, prompt tokens) the prefix it shares with others, or None.

    A session can be in one group only, and a group has one prefix. Of the prefixes that a prompt
    shares, it gets the one with the most tokens times other users. What is claimed is really
    shared; sharing at other depths is left out.
    """
    tree = PrefixTree()
    for ids, _ in prompts:
        tree.add(ids)
    out: list[SharedPrefix | None] = []
    for ids, tokens in prompts:
        path = tree.path(ids)
        depth = max(
            range(len(path)), key=lambda k: (k + 1) * (tree.uses[path[k]] - 1), default=None
        )
        if depth is None or tree.uses[path[depth]] < 2:
            out.append(None)
        else:
            shared = min((depth + 1) * block_size, tokens)
            out.append(SharedPrefix(f"prefix-{path[depth]}", shared))
    return out
