"""The blocks of decoders that are not transformers: where they are, their scores, taking them out.

ShortGPT (arXiv 2403.03853, section 4.5) applies Block Influence unchanged to Mamba and RWKV: all it needs is a
residual stream, `x_{i+1} = x_i + f_i(x_i)`. The models here are Transformers' own classes, because the
runtime has no recurrent sub-layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.shortgpt.ranking import BlockScores, token_scores

# Mamba's plain-torch scan holds several [tokens, 2C, state] float32 tensors: 0.7 GB each at this size for a 2.8B model
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class OtherFamily:
    """What differs between families; attribute names are those of Transformers.

    blocks: the list of blocks on `model.base_model`; entry: the part of a block whose input is the
    hidden state that enters the block, "" for the block itself; embedding_norm: a norm of the embeddings
    that lives in the first block, which therefore must outlive that block; min_blocks: fewest blocks that
    Transformers loads again. No family here stores a per-layer list: `layer_types` is derived from the count.
    """

    blocks: str
    entry: str = ""
    embedding_norm: str = ""
    min_blocks: int = 1


_MAMBA = OtherFamily("layers")

# model_type -> family. RWKV-4 only: v5 and later are not in Transformers and would need remote code.
# RWKV keeps two blocks: the initialisation of its class divides by num_hidden_layers - 1, also when loading.
OTHER_FAMILIES: dict[str, OtherFamily] = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": _MAMBA,
    "rwkv": OtherFamily("blocks", entry="ln1", embedding_norm="pre_ln", min_blocks=2),
}

_INDEX_NAMES = ("layer_idx", "layer_id")  # on blocks and their parts: the slot in the cache
_COUNT_KEYS = ("num_hidden_layers", "n_layer")  # converted Mamba configs carry the second as well


def family_of(model_type: object) -> OtherFamily:
    """The table's entry; InputError for any other model type."""
    family = OTHER_FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(f"model_type: expected one of {', '.join(OTHER_FAMILIES)}, got {model_type!r}")
    return family


def block_list(model: Any) -> nn.ModuleList:
    """The blocks of a Transformers causal language model of one of `OTHER_FAMILIES`."""
    blocks = getattr(model.base_model, family_of(model.config.model_type).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def num_parameters(module: nn.Module) -> int:
    """Distinct parameters of `module`: tied embeddings count once."""
    return sum(p.numel() for p in module.parameters())


def block_parameters(model: Any) -> int:
    """Parameters that dropping one block removes, the same for every block of these families."""
    family = family_of(model.config.model_type)
    first, *rest = block_list(model)
    staying = num_parameters(getattr(first, family.embedding_norm)) if family.embedding_norm else 0
    sizes = {num_parameters(first) - staying, *(num_parameters(b) for b in rest)}
    assert len(sizes) == 1, sizes
    return sizes.pop()


def blocks_for_sparsity(model: Any, sparsity: float, removable: int) -> int:
    """Fewest blocks whose removal reaches `sparsity` of all parameters, embeddings included."""
    per_block, total = block_parameters(model), num_parameters(model)
    blocks = math.ceil(sparsity * total / per_block - 1e-9)
    if blocks > removable:
        raise InputError(
            f"sparsity: {sparsity} would take {blocks} blocks, only {removable} of "
            f"{model.config.num_hidden_layers} can go; the most is {removable * per_block / total:.3f} "
            "(embeddings count and stay)"
        )
    return blocks


def batches(windows: Tensor) -> tuple[Tensor, ...]:  # [N, S] -> [n, S] each
    """The windows in the batches of one forward pass each."""
    split: tuple[Tensor, ...] = windows.split(max(1, _BATCH_TOKENS // windows.shape[1]))
    return split


@torch.inference_mode()
def score_model(
    model: Any,
    windows: Tensor,  # [N, S] int64
    progress: Callable[[], None] = lambda: None,
) -> BlockScores:
    """Both data-driven scores of every block in one pass; `progress` is called once a batch.

    Hooks add up each block's scores as it runs, so only one block's hidden states [n, S, C] are held.
    The last block is measured before the final norm; RWKV's first block after the norm of the embeddings.
    Afterwards an RWKV model's weights are rescaled in place (`rescale_every`): load it again to write it.
    """
    family, blocks = family_of(model.config.model_type), block_list(model)
    influence = torch.zeros(len(blocks), dtype=torch.float64)
    magnitude = torch.zeros(len(blocks), dtype=torch.float64)
    entering: list[Tensor] = []

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entering.append(inputs[0])

    def leave(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            leaving = output[0] if isinstance(output, tuple) else output
            bi, rm = token_scores(entering.pop(), leaving)
            influence[index] += bi.double().sum().cpu()
            magnitude[index] += rm.double().sum().cpu()

        return hook

    model.eval()
    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(blocks):
            handle = block.get_submodule(family.entry).register_forward_pre_hook(enter)
            hooks.callback(handle.remove)
            hooks.callback(block.register_forward_hook(leave(index)).remove)
        for batch in batches(windows):
            model.base_model(batch.to(model.device), use_cache=False)  # without the head: its logits are not needed
            assert not entering
            progress()
    tokens = windows.numel()
    return BlockScores((influence / tokens).tolist(), (magnitude / tokens).tolist())


def drop_blocks(model: Any, dropped: Collection[int]) -> None:
    """Take blocks out of `model` in place: their modules, the indices of the rest, the counts in its config.

    Leaves what the parent computes when the residual stream passes by these blocks. For RWKV that holds
    up to the epsilon of the final norm, because Transformers halves the stream every `rescale_every` blocks.
    """
    family, blocks = family_of(model.config.model_type), block_list(model)
    # an RWKV model that has run holds weights divided by powers of two that depend on the old indices
    assert not getattr(model.base_model, "layers_are_rescaled", False), "load the model again before dropping"
    kept = [block for index, block in enumerate(blocks) if index not in dropped]
    assert len(kept) >= family.min_blocks
    assert len(kept) + len(set(dropped)) == len(blocks)
    if family.embedding_norm and kept[0] is not blocks[0]:
        kept[0].add_module(family.embedding_norm, blocks[0].get_submodule(family.embedding_norm))
    setattr(model.base_model, family.blocks, nn.ModuleList(kept))
    for index, block in enumerate(kept):
        for module in block.modules():
            for name in _INDEX_NAMES:
                if hasattr(module, name):
                    setattr(module, name, index)
    for key in _COUNT_KEYS:
        if hasattr(model.config, key):
            setattr(model.config, key, len(kept))
