"""`KVCache`: paged keys and values, sized per attention sub-layer.

Widths differ between sub-layers of a pruned model, and a dropped attention has no cache at all.
"""

from __future__ import annotations

import torch

from depthprune_runtime.model.sublayers import KVPair
from depthprune_runtime.spec import AttentionSpec, DecoderSpec


class KVCache:
    """`num_kv_blocks` pages of `kv_block_size` tokens for every attention sub-layer.

    pairs[i]: (keys, values) of sub-layer i, [num_kv_blocks, kv_block_size, K_i, D_i] each, or None for an FFN.
    """

    def __init__(
        self, spec: DecoderSpec, num_kv_blocks: int, kv_block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.kv_block_size = kv_block_size
        self.num_kv_blocks = num_kv_blocks
        self.pairs: list[KVPair | None] = []
        for sublayer in spec.sublayers:
            if not isinstance(sublayer, AttentionSpec):
                self.pairs.append(None)
                continue
            shape = (num_kv_blocks, kv_block_size, sublayer.num_kv_heads, sublayer.head_dim)
            self.pairs.append(
                (torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
            )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self.pairs if pair is not None for t in pair)


def kv_blocks_needed(tokens: int, kv_block_size: int) -> int:
    return -(-tokens // kv_block_size)
