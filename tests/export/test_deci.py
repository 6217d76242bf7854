"""Exported DeciLM folders: their config read as vLLM, SGLang and MLX-LM read it, and their weights run."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.checkpoint.paired_layout import ffn_multiplier
from depthprune_runtime.errors import InputError
from depthprune_runtime.export.export import export_model
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder

CPU = torch.device("cpu")
FITTING = ["uniform", "tied", "rope", "bias", "attention_only", "ffn_only", "ffns_first", "all_biases", "wide_uniform"]
FITTING += ["irregular_bias"]
REFUSED = ["window", "qk_norm", "widths", "wide", "wide_qk_norm", "some_windows"]


def deci_width(multiplier: float, hidden_size: int) -> int:
    """As the engines' code has it."""
    width = int(2 * multiplier * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def norm(x, gain, eps):
    layer = LlamaRMSNorm(x.shape[-1], eps)
    layer.weight.data = gain
    return layer(x)


def deci_logits(folder, ids):
    """The model as DeciLM code computes it, from config.json and the tensors by their names."""
    from safetensors.torch import load_file

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    weights = load_file(folder / "model.safetensors")
    heads, eps, length = config.num_attention_heads, config.rms_norm_eps, ids.shape[0]
    cos, sin = LlamaRotaryEmbedding(config)(weights["model.norm.weight"], torch.arange(length)[None])
    x = weights["model.embed_tokens.weight"][ids][None]

    def linear(x, name):
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    for number, block in enumerate(config.block_configs):
        prefix = f"model.layers.{number}."
        if not block.attention.no_op:
            h = norm(x, weights[prefix + "input_layernorm.weight"], eps)
            kv_heads = heads // block.attention.n_heads_in_group
            q, k, v = (linear(h, f"{prefix}self_attn.{n}_proj").view(1, length, -1, config.head_dim) for n in "qkv")
            assert q.shape[2] == heads and k.shape[2] == v.shape[2] == kv_heads
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            out = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
            x = x + linear(out.transpose(1, 2).reshape(1, length, -1), f"{prefix}self_attn.o_proj")
            assert (f"{prefix}self_attn.o_proj.bias" in weights) == config.attention_bias
        if not block.ffn.no_op:
            h = norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
            gate, up = linear(h, f"{prefix}mlp.gate_proj"), linear(h, f"{prefix}mlp.up_proj")
            assert gate.shape[-1] == deci_width(block.ffn.ffn_mult, config.hidden_size)
            x = x + linear(functional.silu(gate) * up, f"{prefix}mlp.down_proj")
    assert not config.block_configs[0].attention.no_op
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(norm(x, weights["model.norm.weight"], eps), head)[0]


@pytest.mark.parametrize("name", FITTING)
def test_decilm_computes_the_same(pruned, tmp_path, name):
    result = export_model(pruned(name), tmp_path / "out", "deci")
    assert result.kind == "nemotron-nas"
    assert result.distance is not None and result.distance < 1e-5
    source = open_checkpoint(pruned(name))
    ids = torch.randint(source.spec.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(source.spec, source.tensor, CPU, torch.float32)
    with torch.inference_mode():
        wanted = decoder.logits(decoder.hidden_states(ids, packed([40], CPU)))
        found = deci_logits(tmp_path / "out", ids)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_a_target_that_can(pruned, tmp_path, name):
    with pytest.raises(InputError, match="--to hf can") as error:
        export_model(pruned(name), tmp_path / "out", "deci")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_block_configs(pruned, tmp_path):
    export_model(pruned("ffns_first"), tmp_path / "out", "deci", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    blocks = config["block_configs"]
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert [b["attention"]["no_op"] for b in blocks] == [False, True, False, False, False, False]
    assert [b["ffn"]["no_op"] for b in blocks] == [False, False, False, True, False, False]
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [9, None, 3, 3, 3, 3]
    assert config["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize("hidden_size", [576, 1024, 4096, 8192, 16384])
def test_multipliers_give_the_width(hidden_size):
    for width in range(256, 32768, 256):
        assert deci_width(ffn_multiplier(width, hidden_size), hidden_size) == width


def test_the_config_survives_saving(pruned, tmp_path):
    export_model(pruned("attention_only"), tmp_path / "out", "deci", check=False)
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["block_configs"] == json.loads((tmp_path / "out" / "config.json").read_text())["block_configs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_configs": []}, "block_configs"),
        ({"block_configs": [{"attention": {"replace_with_linear": True}}] * 6}, "replace_with_linear"),
        ({"block_configs": [{"attention": {"n_heads_in_group": 4}}] * 6}, "n_heads_in_group"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_configs_that_are_refused(pruned, tmp_path, change, message):
    export_model(pruned("attention_only"), tmp_path / "out", "deci", check=False)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "out")
