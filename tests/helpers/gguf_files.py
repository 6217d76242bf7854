"""GGUF files as llama.cpp's converter writes them, for tests."""

from __future__ import annotations

import gguf
import numpy as np
import torch

INTERLEAVED = ("llama", "smollm3", "granite")
ARCHITECTURES = {"gemma3_text": "gemma3"}  # where it is not the model_type
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
OWN_NAMES = {
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "olmo2": AFTER,
    "gemma2": {**AFTER, "pre_feedforward_layernorm": "ffn_norm"},
    "gemma3": {**AFTER, "pre_feedforward_layernorm": "ffn_norm"},
}


def own_metadata(arch, config):
    """What the converter writes for some architectures only."""
    if arch == "granite":
        return {
            "granite.attention.scale": config.attention_multiplier, "granite.embedding_scale":
            config.embedding_multiplier, "granite.residual_scale": config.residual_multiplier,
            "granite.logit_scale": config.logits_scaling,
        }  # fmt: skip
    if arch == "phi3":
        head_dim = config.hidden_size // config.num_attention_heads
        part = config.rope_parameters["partial_rotary_factor"]
        return {"phi3.rope.dimension_count": int(head_dim * part)}
    if arch in ("gemma2", "gemma3"):
        found = {f"{arch}.attention.sliding_window": config.sliding_window}
        if arch == "gemma2":
            found["gemma2.attn_logit_softcapping"] = config.attn_logit_softcapping
            found["gemma2.final_logit_softcapping"] = config.final_logit_softcapping
        return found
    return {}


def interleave(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Half-split rotary rows to llama.cpp's interleaved order."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape).contiguous().numpy()


def add_metadata(writer, key, value):
    """One value with the type that a Python value suggests; it replaces what the writer has."""
    for known in writer.kv_data:
        known.pop(key, None)
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_gguf(model, path, quantization=gguf.GGMLQuantizationType.F32, architecture=None, extra=None, metadata=None):
    """What llama.cpp's converter writes for `model`."""
    config = model.config
    arch = architecture or ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    names = {**NAMES, **OWN_NAMES.get(arch, {})}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name in whole:
            target, data = whole[name], tensor.numpy()
        else:
            _, _, block, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            target, data = f"blk.{block}.{names[part]}.{kind}", tensor.numpy()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(names[part])
            if heads and arch in INTERLEAVED:
                data = interleave(tensor, heads)
        if arch.startswith("gemma") and target.endswith("norm.weight"):
            data = data + 1
        if data.ndim > 1 and quantization != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(data, quantization)
            writer.add_tensor(target, data, raw_dtype=quantization)
        else:
            writer.add_tensor(target, data)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    for key, value in {**own_metadata(arch, config), **(metadata or {})}.items():
        add_metadata(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
