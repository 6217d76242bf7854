"""Where the keys of a sequence lie: in a row of tokens, or in the kv_blocks of the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def paged_rows(positions, mask, table_ptr, block_size: tl.constexpr, block_stride, slot_stride):
    """Offsets [BLOCK_N] int64 of tokens `positions` of a request; where `mask` is false nothing is read.

    table_ptr: its row of the block tables, [M]; the strides are those of the cache's first two dimensions [N, P].
    """
    kv_blocks = tl.load(table_ptr + positions // block_size, mask=mask, other=0).to(tl.int64)
    return kv_blocks * block_stride + (positions % block_size).to(tl.int64) * slot_stride
