"""Tensor names of sources by packed name, and the shapes that the sources' own tensors have.

Packed tensors are described as rows of source tensors: importing, digesting and streaming share one description.
"""

from __future__ import annotations

from collections.abc import Mapping

from depthprune_runtime.spec import AttentionSpec, DecoderSpec, Shape

Names = Mapping[str, tuple[str, ...]]

# Source names by packed name; several names are concatenated along dimension 0.
HF_BLOCK = "model.layers.{block}."
HF_NAMES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
    "attention.norm.weight": (HF_BLOCK + "input_layernorm.weight",),
    "attention.qkv_proj.weight": tuple(HF_BLOCK + f"self_attn.{x}_proj.weight" for x in "qkv"),
    "attention.qkv_proj.bias": tuple(HF_BLOCK + f"self_attn.{x}_proj.bias" for x in "qkv"),
    "attention.q_norm.weight": (HF_BLOCK + "self_attn.q_norm.weight",),
    "attention.k_norm.weight": (HF_BLOCK + "self_attn.k_norm.weight",),
    "attention.o_proj.weight": (HF_BLOCK + "self_attn.o_proj.weight",),
    "attention.o_proj.bias": (HF_BLOCK + "self_attn.o_proj.bias",),
    "ffn.norm.weight": (HF_BLOCK + "post_attention_layernorm.weight",),
    "ffn.gate_up_proj.weight": (HF_BLOCK + "mlp.gate_proj.weight", HF_BLOCK + "mlp.up_proj.weight"),
    "ffn.down_proj.weight": (HF_BLOCK + "mlp.down_proj.weight",),
}
GGUF_BLOCK = "blk.{block}."
GGUF_NAMES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("token_embd.weight",),
    "norm.weight": ("output_norm.weight",),
    "lm_head.weight": ("output.weight",),
    "attention.norm.weight": (GGUF_BLOCK + "attn_norm.weight",),
    "attention.qkv_proj.weight": tuple(GGUF_BLOCK + f"attn_{x}.weight" for x in "qkv"),
    "attention.qkv_proj.bias": tuple(GGUF_BLOCK + f"attn_{x}.bias" for x in "qkv"),
    "attention.q_norm.weight": (GGUF_BLOCK + "attn_q_norm.weight",),
    "attention.k_norm.weight": (GGUF_BLOCK + "attn_k_norm.weight",),
    "attention.post_norm.weight": (GGUF_BLOCK + "post_attention_norm.weight",),
    "attention.o_proj.weight": (GGUF_BLOCK + "attn_output.weight",),
    "attention.o_proj.bias": (GGUF_BLOCK + "attn_output.bias",),
    "ffn.norm.weight": (GGUF_BLOCK + "ffn_norm.weight",),
    "ffn.gate_up_proj.weight": (GGUF_BLOCK + "ffn_gate.weight", GGUF_BLOCK + "ffn_up.weight"),
    "ffn.down_proj.weight": (GGUF_BLOCK + "ffn_down.weight",),
    "ffn.down_proj.bias": (GGUF_BLOCK + "ffn_down.bias",),
    "ffn.post_norm.weight": (GGUF_BLOCK + "post_ffw_norm.weight",),
}


def source_names(table: Names, spec: DecoderSpec, name: str) -> tuple[str, ...]:
    """Names in the source of packed tensor `name` of a dense `spec`."""
    if not name.startswith("sublayers."):
        return table[name]
    block = spec.sublayers[int(name.split(".", 2)[1])].origin[0]
    return tuple(n.format(block=block) for n in table[source_key(spec, name)])


def source_shapes(table: Names, spec: DecoderSpec) -> dict[str, dict[str, Shape]]:
    """Packed name -> name in the source -> shape there, for every tensor of a dense `spec`."""
    found: dict[str, dict[str, Shape]] = {}
    for name, (rows, *rest) in spec.tensor_shapes().items():
        sources = source_names(table, spec, name)
        shapes: list[Shape] = [(rows // len(sources), *rest)] * len(sources)
        if name.startswith("sublayers."):
            sublayer = spec.sublayers[int(name.split(".", 2)[1])]
            if isinstance(sublayer, AttentionSpec):
                if ".qkv_proj." in name and len(sources) > 1:
                    shapes = [(width, *rest) for width in (sublayer.q_size, sublayer.kv_size, sublayer.kv_size)]
                elif name.endswith(("q_norm.weight", "k_norm.weight")):
                    once = sublayer.qk_norm_over == "head"  # one gain for all heads
                    shapes = [(sublayer.head_dim if once else rows * sublayer.head_dim,)]
        found[name] = dict(zip(sources, shapes, strict=True))
    return found


def source_key(spec: DecoderSpec, name: str) -> str:
    """Key of packed tensor `name` in a table of names or of folds."""
    if not name.startswith("sublayers."):
        return name
    _, index, short = name.split(".", 2)
    return f"{spec.sublayers[int(index)].kind}.{short}"
