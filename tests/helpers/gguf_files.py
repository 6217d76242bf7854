"""GGUF files as llama.cpp's converter writes them, for tests."""

from __future__ import annotations

import gguf
import numpy as np
import torch


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
    arch = architecture or config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
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
            if heads and arch == "llama":
                data = interleave(tensor, heads)
        if data.ndim > 1 and quantization != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(data, quantization)
            writer.add_tensor(target, data, raw_dtype=quantization)
        else:
            writer.add_tensor(target, data)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    for key, value in (metadata or {}).items():
        add_metadata(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
