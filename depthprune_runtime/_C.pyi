"""The C++ extension: csrc/module.cpp and csrc/cpu/step. Its ops are reached through `torch.ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor

def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
def set_cpu_level(name: str) -> None: ...

class StepLinear:
    def __init__(
        self,
        weight: Sequence[Tensor],  # [rows], [panels], [codes, scales] or [codes, scales, zeros]
        bias: Tensor | None,  # [N]
        out_features: int,
        in_features: int,
        format: int,  # a number of `weights.weight.Format`
        bits: int,  # of a code, 4 or 8
        group_size: int,
    ) -> None: ...

class StepBuilder:
    def __init__(self, dtype: torch.dtype, hidden_size: int, eps: float) -> None: ...
    def add_attention(
        self,
        norm: Tensor,  # [C]
        qkv: StepLinear,
        o: StepLinear,
        q_norm: Tensor | None,  # [H, D]
        k_norm: Tensor | None,  # [K, D]
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,  # 0: none
        rotary: int,  # which of the tables of a step
        k_cache: Tensor,  # [N, P, K, D]
        v_cache: Tensor,  # [N, P, K, D]
    ) -> None: ...
    def add_ffn(self, norm: Tensor, gate_up: StepLinear, down: StepLinear) -> None: ...
    def set_ends(self, embedding: StepLinear, norm: Tensor, lm_head: StepLinear) -> None: ...

class DecodeStep:
    def __init__(self, builder: StepBuilder, /) -> None: ...
    def max_tokens(self) -> int: ...
    def run(
        self,
        ids: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64
        slots: Tensor,  # [T] int64
        block_tables: Tensor,  # [T, M] int64
        context_lens: Tensor,  # [T] int64
        cos_sin: Sequence[Tensor],  # [S, 2, D/2] each
        /,
    ) -> Tensor: ...  # [T, V]
    def ahead(
        self,
        ids: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64
        block_tables: Tensor,  # [T, M] int64, with room for all steps
        cos_sin: Sequence[Tensor],  # [S, 2, D/2] each
        stop_ids: Tensor,  # [T, E] int64, padded with -1
        steps: int,
        seconds: float,
        /,
    ) -> Tensor: ...  # [steps that were made, T] int64
