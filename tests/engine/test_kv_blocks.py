"""The pool of kv_blocks: sharing, LRU, and that nothing is lost."""

from __future__ import annotations

import pytest

from depthprune_runtime.engine.kv_blocks import BlockTable, KVBlockPool


def computed(pool: KVBlockPool, ids: list[int]) -> BlockTable:
    """A table whose tokens have all been computed."""
    table, _ = pool.allocate(ids)
    pool.publish(table, ids, len(ids))
    return table


def test_equal_beginnings_share_full_kv_blocks():
    pool = KVBlockPool(10, 4)
    first = computed(pool, list(range(10)))
    table, cached = pool.allocate([*range(8), 99, 100])
    assert cached == 8
    assert table.kv_blocks[:2] == first.kv_blocks[:2]
    assert table.kv_blocks[2] != first.kv_blocks[2]
    pool.check([first, table])
    pool.release(first)
    pool.check([table])
    pool.release(table)
    pool.check([])
    assert pool.num_free == 10


def test_the_last_token_is_always_computed():
    pool = KVBlockPool(10, 4)
    pool.release(computed(pool, list(range(8))))
    assert pool.allocate(list(range(8)))[1] == 4
    assert pool.allocate(list(range(9)))[1] == 8


def test_a_kv_block_is_found_only_behind_its_own_beginning():
    pool = KVBlockPool(10, 2)
    computed(pool, [1, 2, 3, 4, 9])
    assert pool.allocate([3, 4, 9])[1] == 0
    assert pool.allocate([5, 5, 3, 4, 9])[1] == 0
    assert pool.allocate([1, 2, 3, 4, 9])[1] == 4


def test_ids_with_equal_hashes_are_told_apart():
    pool = KVBlockPool(10, 1)
    assert hash((0, (-1,))) == hash((0, (-2,)))  # CPython: hash(-1) == hash(-2)
    computed(pool, [-1, 7])
    assert pool.allocate([-2, 7])[1] == 0
    assert pool.allocate([-1, 7])[1] == 1


def test_the_least_recently_used_content_goes_first():
    pool = KVBlockPool(4, 2)
    pool.release(computed(pool, [1, 1, 1, 1]))
    pool.release(computed(pool, [2, 2, 2, 2]))
    pool.release(pool.allocate([1, 1, 1, 1, 0], reserve=0)[0])  # reads 1 1 1 1 again; takes the end of 2 2 2 2
    pool.check([])
    assert pool.allocate([2, 2, 2, 2, 0], reserve=4) is None
    found, cached = pool.allocate([2, 2, 2])
    assert cached == 2  # an end goes before its beginning
    pool.release(found)
    assert pool.allocate([1, 1, 1, 1, 0])[1] == 4
    pool.clear_cache()
    assert pool.num_cached == 0


def test_what_does_not_fit_changes_nothing():
    pool = KVBlockPool(3, 2)
    table = computed(pool, [1, 2, 3])
    assert pool.allocate([1, 2, 3, 4, 5, 6]) is None  # one shared, two more, but only one is free
    pool.check([table])
    assert pool.allocate([1, 2, 3], reserve=1) is None
    shared, cached = pool.allocate([1, 2, 3])
    assert cached == 2
    assert not pool.grow(shared, 5)
    pool.check([table, shared])
    pool.release(table)
    assert pool.grow(shared, 5)
    pool.check([shared])


def test_forgotten_contents_are_not_found_and_not_lost():
    pool = KVBlockPool(6, 2)
    table = computed(pool, [1, 2, 3, 4, 5])
    sharing, _ = pool.allocate([1, 2, 9])
    pool.forget(table)
    pool.check([table, sharing])
    again, cached = pool.allocate([1, 2, 9])
    assert cached == 0
    pool.release(again)
    pool.release(table)
    pool.release(sharing)
    pool.clear_cache()
    pool.check([pool.allocate([7] * 6)[0]])


def test_without_prefix_caching_nothing_is_shared():
    pool = KVBlockPool(6, 2, enable_prefix_caching=False)
    first = computed(pool, [1, 2, 3])
    second, cached = pool.allocate([1, 2, 3])
    assert cached == 0
    assert not set(first.kv_blocks) & set(second.kv_blocks)
    pool.check([first, second])


def test_check_finds_what_is_wrong():
    pool = KVBlockPool(4, 2)
    table = computed(pool, [1, 2, 3])
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])
    table.kv_blocks.append(3)
    with pytest.raises(AssertionError):
        pool.check([table])
