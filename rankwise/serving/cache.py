"""Room for keys and values in blocks, and which blocks hold the beginning of a prompt already.

A block holds `BLOCK` tokens of every layer.  A full block can be found again by what it holds: the tokens in it, all
that came before them, and the digest of the adapter they went through.  Blocks that nobody uses stay as they are until
room is wanted; the one that was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK = 16  # tokens

Node = int | str  # a block that can be found again, by number; the digest that a chain of them begins at


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class Blocks:
    """Whose each of `count` blocks is.

    Attributes:
        hits: how many tokens were found again so far.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.hits = 0
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and unused, the longest unused first
        self._known: dict[tuple[Node, tuple[int, ...]], tuple[int, int]] = {}  # → node, block
        self._keys: dict[int, tuple[Node, tuple[int, ...]]] = {}  # by block
        self._nodes = 0

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Blocks that hold something to be found again and are not used."""
        return len(self._idle)

    def known(self, digest: str, tokens: Sequence[int]) -> tuple[list[int], Node]:
        """The blocks that hold how `tokens` begin, and the node of the last; never all of the tokens.

        One token at least is left to be computed: what it predicts is in no block.
        """
        found: list[int] = []
        node: Node = digest
        for start in range(0, len(tokens) - BLOCK, BLOCK):
            at = self._known.get((node, tuple(tokens[start : start + BLOCK])))
            if at is None:
                break
            node = at[0]
            found.append(at[1])
        return found, node

    def taken(self, known: Sequence[int], fresh: int) -> list[int] | None:
        """The `known` blocks and so many fresh ones, now used once more; None if there are not enough."""
        revived = sum(not self._users[block] for block in known)
        if fresh > self.available - revived:
            return None
        for block in known:
            self._idle.pop(block, None)
            self._users[block] += 1
        self.hits += BLOCK * len(known)
        return [*known, *(self._fresh() for _ in range(fresh))]

    def _fresh(self) -> int:
        if not self._free:
            oldest, _ = self._idle.popitem(last=False)
            self._forget(oldest)
            self._free.append(oldest)
        block = self._free.pop()
        self._users[block] = 1
        return block

    def publish(self, block: int, after: Node, tokens: Sequence[int]) -> Node:
        """A block that holds these tokens, after those of a node, can be found from now on; gives its own node.

        Where another block holds the same already, that one stays the one that is found.
        """
        key = (after, tuple(tokens))
        at = self._known.get(key)
        if at is not None:
            return at[0]
        self._nodes += 1
        self._known[key] = self._nodes, block
        self._keys[block] = key
        return self._nodes

    def release(self, blocks: Sequence[int], *, spoilt: bool = False) -> None:
        """No longer used by one user; `spoilt`: what they hold is not to be found again."""
        for block in reversed(blocks):  # the end of a chain is of no use without its beginning: it goes first
            self._users[block] -= 1
            if spoilt:
                self._forget(block)
            if self._users[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._known[key]

    def clear(self) -> None:
        """Forgets everything that is not used."""
        while self._idle:
            block, _ = self._idle.popitem()
            self._forget(block)
            self._free.append(block)

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> Iterator[int]:
        """Where tokens `start` up to `stop` of a request lie."""
        return (blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(start, stop))
