"""Hugging Face folders: a stock class where one expresses the model, else our own class, which travels with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.anchored_layout import CODE_FILES, anchored_config, anchored_shapes
from depthprune_runtime.checkpoint.paired_layout import numbered
from depthprune_runtime.export import folder
from depthprune_runtime.export.parts import Parts, Unpacked
from depthprune_runtime.export.rope import recognized
from depthprune_runtime.families import HF_NAMES, rope_to_config, source_shapes
from depthprune_runtime.spec import AttentionSpec, DecoderSpec

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def refuses(spec: DecoderSpec) -> str | None:
    """Why no Hugging Face folder can hold `spec`; None where one can."""
    attentions = spec.attention_sublayers()
    if not attentions:
        return "a Hugging Face layer needs an attention, and the model has none"
    sizes = sorted({attention.head_dim for attention in attentions})
    if len(sizes) > 1:
        return f"a Hugging Face folder has one head_dim, the model has {sizes}"
    windows = sorted({attention.sliding_window for attention in attentions if attention.sliding_window})
    if len(windows) > 1:
        return f"a Hugging Face folder has one sliding window, the model has {windows}"
    return None


def per_head_gains(checkpoint: Checkpoint) -> frozenset[int]:
    """Attentions whose q/k gains differ from head to head, as those of merged blocks do."""
    found = set()
    for index, sublayer in enumerate(checkpoint.spec.sublayers):
        if isinstance(sublayer, AttentionSpec) and sublayer.qk_norm:
            gains = [checkpoint.tensor(f"sublayers.{index}.{name}.weight") for name in ("q_norm", "k_norm")]
            if any(not torch.equal(gain, gain[:1].expand_as(gain)) for gain in gains):
                found.add(index)
    return frozenset(found)


def stock_family(spec: DecoderSpec) -> str | None:
    """The `model_type` whose stock class computes `spec`, if all gains are shared; None where none does."""
    uniform = spec.uniform()
    if uniform is None or uniform[2].down_bias or spec.rope.kind == "factors":
        return None
    _, attention, _ = uniform
    biases = (attention.qkv_bias, attention.o_bias)
    windowed = attention.sliding_window is not None
    if attention.qk_norm:
        return "qwen3" if biases[0] == biases[1] else None
    if biases == (True, False):
        return "qwen2" if attention.q_size == spec.hidden_size else None  # its config has no head_dim
    if biases == (False, False) and windowed:
        return "mistral"
    divides = spec.hidden_size % attention.num_heads == 0  # which Llama's config asks for
    return "llama" if divides and biases[0] == biases[1] and not windowed else None


def stock_config(spec: DecoderSpec, family: str) -> dict[str, Any]:
    """config.json of uniform `spec` for the stock class of `family`."""
    uniform = spec.uniform()
    assert uniform is not None
    blocks, attention, ffn = uniform
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": ffn.intermediate_size,
        "num_hidden_layers": blocks,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": rope_to_config(spec.rope),
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    if family != "qwen2":
        config["head_dim"] = attention.head_dim
    if family in ("llama", "qwen3"):
        config["attention_bias"] = attention.qkv_bias
    if family == "mistral":
        config["sliding_window"] = attention.sliding_window
    if family.startswith("qwen"):
        window = attention.sliding_window
        config |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
        if window is None:
            config["max_window_layers"] = blocks
    return config


@dataclass(frozen=True)
class Layout:
    """How a model lies in a folder. kind: the stock `model_type`, or `depthprune`."""

    kind: str
    config: Mapping[str, Any]
    parts: Parts
    code: Collection[str] = ()


def layout(checkpoint: Checkpoint) -> Layout:
    """The folder of `checkpoint`, which `refuses` lets pass."""
    spec = dataclasses.replace(checkpoint.spec, rope=recognized(checkpoint.spec))
    per_head = per_head_gains(checkpoint)
    family = None if per_head else stock_family(spec)
    if family is not None:
        return Layout(family, stock_config(spec, family), source_shapes(HF_NAMES, numbered(spec)))
    lineage = {"plan": checkpoint.plan, "provenance": dict(checkpoint.provenance)}
    config = anchored_config(spec, per_head, lineage)
    return Layout("depthprune", config, anchored_shapes(spec, per_head), CODE_FILES)


def write(
    checkpoint: Checkpoint,
    path: Path,
    dtype: torch.dtype,
    max_shard_size: int,
    on_tensor: Callable[[], None],
) -> str:
    """Fill the empty folder `path`; returns the kind of the layout."""
    made = layout(checkpoint)
    folder.write_weights(path, Unpacked(checkpoint, made.parts, dtype, on_tensor), max_shard_size)
    folder.write_config(path, checkpoint, made.config, dtype)
    folder.write_assets(path, checkpoint)
    folder.write_code(path, made.code)
    return made.kind
