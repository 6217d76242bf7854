"""`KVBlockPool`: which kv_block belongs to whom. Reference counts, prefix caching, LRU reuse. Imports no torch.

One `BlockTable` serves every attention sub-layer of a request: their widths differ, the tokens do not.

Prefix caching works on full kv_blocks. The content of a full kv_block is named by

    key = (name of the content before it, its token ids)         name = a fresh number per key

a trie whose edges are compared by their token ids, so two different contents cannot be taken for each other
(a hash chain, as in vLLM, can only make that unlikely). A full kv_block is never written again, so tables share
it freely; a table's last, unfinished kv_block is always its own. Source: Kwon et al., arXiv 2309.06180.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ROOT = 0  # name of the empty content
_Key = tuple[int, tuple[int, ...]]


class BlockTable:
    """kv_blocks of one request in order. The first `num_named` are full and have names; `name` is the last one's."""

    __slots__ = ("kv_blocks", "name", "num_named")

    def __init__(self) -> None:
        self.kv_blocks: list[int] = []
        self.num_named = 0
        self.name = _ROOT


class KVBlockPool:
    """`num_kv_blocks` kv_blocks of `kv_block_size` tokens.

    Each is in exactly one state: in use (reference count >= 1), free with nothing of value, or cached-free (nobody
    holds it, but its content can be found again; the least recently used one is given out last of all free ones).
    """

    def __init__(self, num_kv_blocks: int, kv_block_size: int, enable_prefix_caching: bool = True) -> None:
        assert num_kv_blocks >= 1
        assert kv_block_size >= 1
        self.num_kv_blocks = num_kv_blocks
        self.kv_block_size = kv_block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_releases = 0  # grows whenever kv_blocks come back: until then, what did not fit does not fit
        self._references = [0] * num_kv_blocks
        self._free = list(range(num_kv_blocks - 1, -1, -1))  # a stack: low and neighbouring numbers first
        self._cached_free: dict[int, None] = {}  # oldest first
        self._key_of: list[_Key | None] = [None] * num_kv_blocks
        self._found: dict[_Key, tuple[int, int]] = {}  # key -> kv_block, name of its content
        self._last_name = _ROOT

    @property
    def num_free(self) -> int:
        """kv_blocks that nobody holds, cached or not."""
        return len(self._free) + len(self._cached_free)

    @property
    def num_cached(self) -> int:
        """kv_blocks, in use or not, whose content can be found."""
        return len(self._found)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.kv_block_size)

    def allocate(self, token_ids: Sequence[int], reserve: int = 0) -> tuple[BlockTable, int] | None:
        """A table with room for `token_ids`, and how many of them are in the cache already.

        The last token is never taken from the cache: computing it gives the logits. None if fewer than
        `reserve` kv_blocks would stay free.
        """
        table = BlockTable()
        found = self._match(token_ids, table)
        missing = self.blocks_for(len(token_ids)) - len(found)
        revived = sum(not self._references[b] for b in found)
        if self.num_free - revived - missing < reserve:
            return None
        for block in found:
            if not self._references[block]:
                del self._cached_free[block]
            self._references[block] += 1
        table.kv_blocks = found
        table.kv_blocks += [self._take() for _ in range(missing)]
        return table, table.num_named * self.kv_block_size

    def _match(self, token_ids: Sequence[int], table: BlockTable) -> list[int]:
        """Longest known beginning of `token_ids` in full kv_blocks; its name goes to `table`."""
        found: list[int] = []
        size = self.kv_block_size
        if not self.enable_prefix_caching:
            return found
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            entry = self._found.get((table.name, tuple(token_ids[start : start + size])))
            if entry is None:
                break
            block, table.name = entry
            found.append(block)
        table.num_named = len(found)
        return found

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._cached_free))
            del self._cached_free[block]
            self._unname(block)
        self._references[block] = 1
        return block

    def _unname(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._found[key]
            self._key_of[block] = None

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for `num_tokens` in all; False, and nothing changed, if there are too few free kv_blocks."""
        missing = self.blocks_for(num_tokens) - len(table.kv_blocks)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            table.kv_blocks.append(self._take())
        return True

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Make the full kv_blocks among the first `num_computed` tokens findable.

        May be called before the pass that computes them: within a pass every sub-layer writes all keys and values
        before it attends, so requests of one pass may share what it computes.
        """
        if not self.enable_prefix_caching:
            return
        size = self.kv_block_size
        for index in range(table.num_named, num_computed // size):
            key = (table.name, tuple(token_ids[index * size : (index + 1) * size]))
            entry = self._found.get(key)
            if entry is None:
                self._last_name += 1
                block = table.kv_blocks[index]
                entry = self._found[key] = (block, self._last_name)
                self._key_of[block] = key
            table.name = entry[1]  # where another kv_block has this content, ours stays private
            table.num_named += 1

    def release(self, table: BlockTable) -> None:
        """Give up `table`; what is findable stays so until its room is needed."""
        for block in reversed(table.kv_blocks):  # a beginning outlives what follows it
            self._references[block] -= 1
            if not self._references[block]:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached_free[block] = None
        table.kv_blocks = []
        table.num_named = 0
        table.name = _ROOT
        self.num_releases += 1

    def forget(self, table: BlockTable) -> None:
        """Make the contents of `table` unfindable: they are damaged."""
        for block in table.kv_blocks:
            self._unname(block)

    def clear_cache(self) -> None:
        """Forget every content. Requests that hold kv_blocks keep them."""
        for block, _ in list(self._found.values()):
            self._unname(block)
        self._free += self._cached_free
        self._cached_free = {}

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that every kv_block is in exactly one state, given all tables in use. For tests."""
        held = [0] * self.num_kv_blocks
        for table in tables:
            assert len(set(table.kv_blocks)) == len(table.kv_blocks), "a table holds a kv_block twice"
            assert table.num_named <= len(table.kv_blocks)
            for block in table.kv_blocks:
                held[block] += 1
            for block in table.kv_blocks[table.num_named :]:
                assert held[block] == 1, f"kv_block {block} is still being written, but shared"
                assert self._key_of[block] is None, f"kv_block {block} is still being written, but findable"
        assert held == self._references, "reference counts are not the numbers of tables"
        free, cached = set(self._free), set(self._cached_free)
        in_use = {b for b, count in enumerate(held) if count}
        assert len(free) == len(self._free), "a kv_block is free twice"
        assert not (free & cached or free & in_use or cached & in_use), "a kv_block is in two states"
        assert len(free) + len(cached) + len(in_use) == self.num_kv_blocks, "a kv_block is lost"
        assert not any(self._key_of[b] for b in free), "a findable kv_block is among the worthless ones"
        assert all(self._key_of[b] for b in cached), "a cached-free kv_block has no key"
        assert self._found == {k: (b, self._found[k][1]) for b, k in enumerate(self._key_of) if k is not None}
