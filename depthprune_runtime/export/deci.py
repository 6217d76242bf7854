"""DeciLM folders (`nemotron-nas`), which vLLM, SGLang, TensorRT-LLM and MLX-LM read without code of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.paired_layout import CODE_FILES, WIDTH_STEP, deci_config, numbered
from depthprune_runtime.export import folder
from depthprune_runtime.export.padding import PaddedCheckpoint, Slot
from depthprune_runtime.export.parts import Unpacked
from depthprune_runtime.export.rope import recognized
from depthprune_runtime.families import HF_NAMES, source_shapes
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, SublayerSpec


def refuses(spec: DecoderSpec) -> str | None:
    """Why a DeciLM config cannot say `spec`; None where it can."""
    attentions = spec.attention_sublayers()
    if not attentions:
        return "a DeciLM model needs an attention, and the model has none"
    heads = sorted({attention.num_heads for attention in attentions})
    if len(heads) > 1:
        return f"a DeciLM config has one number of query heads, the model has {heads}"
    if len({attention.head_dim for attention in attentions}) > 1:
        return "a DeciLM config has one head_dim, the model has several"
    if any(attention.qk_norm for attention in attentions):
        return "DeciLM attention has no norms of queries and keys"
    if any(attention.sliding_window for attention in attentions):
        return "DeciLM attention has no sliding window"
    if any(ffn.down_bias for ffn in spec.ffn_sublayers()):
        return "a DeciLM FFN has a bias on all three projections or on none"
    if recognized(spec).kind == "factors":
        return "a DeciLM config has no rotary divisors"
    return None


def slots(spec: DecoderSpec) -> list[Slot]:
    """`spec` as such configs can say it: an attention first, biases on all four projections, FFN widths in steps."""
    attentions = spec.attention_sublayers()
    bias = any(attention.qkv_bias or attention.o_bias for attention in attentions)

    def widened(sublayer: SublayerSpec) -> SublayerSpec:
        if isinstance(sublayer, AttentionSpec):
            return dataclasses.replace(sublayer, qkv_bias=bias, o_bias=bias)
        return dataclasses.replace(
            sublayer, intermediate_size=-(-sublayer.intermediate_size // WIDTH_STEP) * WIDTH_STEP
        )

    made = [Slot(widened(sublayer), index) for index, sublayer in enumerate(spec.sublayers)]
    if not isinstance(spec.sublayers[0], AttentionSpec):
        made.insert(0, Slot(widened(dataclasses.replace(attentions[0], num_kv_heads=1)), None))
    return made


def write(
    checkpoint: Checkpoint,
    path: Path,
    dtype: torch.dtype,
    max_shard_size: int,
    on_tensor: Callable[[], None],
) -> str:
    """Fill the empty folder `path`; returns the kind of the layout."""
    padded = PaddedCheckpoint(checkpoint, slots(checkpoint.spec))
    spec = dataclasses.replace(padded.spec, rope=recognized(padded.spec))
    tensors = Unpacked(padded, source_shapes(HF_NAMES, numbered(spec)), dtype, on_tensor)
    folder.write_weights(path, tensors, max_shard_size)
    folder.write_config(path, checkpoint, deci_config(spec), dtype)
    folder.write_assets(path, checkpoint)
    folder.write_code(path, CODE_FILES)
    return "nemotron-nas"
