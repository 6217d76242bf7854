"""LoRA adapters merged on the way in: by a merge written out here, and against PEFT's own where PEFT is there."""

from __future__ import annotations

import json
import math

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from depthprune_runtime import InputError, import_model, prune
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.cli import main

WIDTH, HIDDEN = 72, 80
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (144, WIDTH), DOWN: (WIDTH, HIDDEN)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pico.save(pico.build_model("llama"), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def weights(base):
    return load_file(base / "model.safetensors")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low_rank(module, rank, seed=0):
    rows, columns = SHAPES[module]
    return {
        f"base_model.model.{module}.lora_A.weight": random(rank, columns, seed=seed),
        f"base_model.model.{module}.lora_B.weight": random(rows, rank, seed=seed),
    }


def save_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def merge(base, tmp_path, tensors, **config):
    adapter = save_adapter(tmp_path / "adapter", tensors, **config)
    import_model(base, tmp_path / "out", adapter=adapter)
    return open_checkpoint(tmp_path / "out")


def product(tensors, module):
    return tensors[f"base_model.model.{module}.lora_B.weight"] @ tensors[f"base_model.model.{module}.lora_A.weight"]


def query_rows(checkpoint):
    return checkpoint.tensor("sublayers.2.qkv_proj.weight")[:144]


def test_additions_are_merged_and_nothing_else_changes(base, weights, tmp_path):
    tensors = low_rank(Q, 4) | low_rank(DOWN, 4)
    merged, plain = merge(base, tmp_path, tensors), open_checkpoint(base)
    torch.testing.assert_close(query_rows(merged), weights[f"{Q}.weight"] + 1.5 * product(tensors, Q))
    torch.testing.assert_close(
        merged.tensor("sublayers.1.down_proj.weight"), weights[f"{DOWN}.weight"] + 1.5 * product(tensors, DOWN)
    )
    assert merged.tensor("sublayers.2.qkv_proj.weight")[144:].equal(plain.tensor("sublayers.2.qkv_proj.weight")[144:])
    changed = {"sublayers.2.qkv_proj.weight", "sublayers.1.down_proj.weight"}
    ours, theirs = merged.checksums(), plain.checksums()
    assert {name for name in ours if ours[name] != theirs[name]} == changed
    assert merged.provenance["adapters"] == [{"source": "adapter", "additions": 2, "replaced": 0}]


def test_ranks_and_alphas_by_pattern(base, weights, tmp_path):
    """The end of a name from a dot on; a pattern is a regular expression."""
    tensors = low_rank(Q, 2) | low_rank(DOWN, 4)
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 2}, "alpha_pattern": {"down_proj": 1.0, "proj": 9.0}}
    merged = merge(base, tmp_path, tensors, **patterns)
    torch.testing.assert_close(query_rows(merged), weights[f"{Q}.weight"] + 3.0 * product(tensors, Q))
    torch.testing.assert_close(
        merged.tensor("sublayers.1.down_proj.weight"), weights[f"{DOWN}.weight"] + 0.25 * product(tensors, DOWN)
    )


def test_rslora_divides_by_the_root(base, weights, tmp_path):
    tensors = low_rank(Q, 3)
    merged = merge(base, tmp_path, tensors, r=3, use_rslora=True)
    expected = weights[f"{Q}.weight"] + 6 / math.sqrt(3) * product(tensors, Q)
    torch.testing.assert_close(query_rows(merged), expected)


def test_bfloat16_is_rounded_once(tmp_path):
    base = pico.save(pico.build_model("llama", torch.bfloat16), tmp_path / "base")
    weight = load_file(base / "model.safetensors")[f"{Q}.weight"]
    tensors = {name: value.bfloat16() for name, value in low_rank(Q, 4).items()}
    merged = merge(base, tmp_path, tensors)
    wide = {name: value.double() for name, value in tensors.items()}
    expected = (weight.double() + 1.5 * product(wide, Q)).to(torch.bfloat16)
    found = query_rows(merged)
    assert found.dtype == torch.bfloat16
    assert (found == expected).float().mean() > 0.999  # of float32 sums some fall on the other side of a tie
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_whole_tensors_replace_the_folders(base, tmp_path):
    head, norm = random(pico.VOCAB_SIZE, WIDTH), random(WIDTH)
    merged = merge(
        base,
        tmp_path,
        {"base_model.model.lm_head.weight": head, "base_model.model.model.norm.weight": norm},
        modules_to_save=["lm_head", "norm"],
    )
    assert merged.tensor("lm_head.weight").equal(head)
    assert merged.tensor("norm.weight").equal(norm)


def test_additions_to_an_embedding(base, weights, tmp_path):
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": random(4, pico.VOCAB_SIZE),
        "base_model.model.model.embed_tokens.lora_embedding_B": random(WIDTH, 4),
    }
    merged = merge(base, tmp_path, tensors)
    down, up = tensors.values()
    expected = weights["model.embed_tokens.weight"] + 1.5 * torch.einsum("rv,cr->vc", down, up)
    torch.testing.assert_close(merged.tensor("embed_tokens.weight"), expected)


def refused(base, tmp_path, message, tensors=None, **config):
    adapter = save_adapter(tmp_path / "adapter", low_rank(Q, 4) if tensors is None else tensors, **config)
    with pytest.raises(InputError, match=message) as caught:
        import_model(base, tmp_path / "out", adapter=adapter)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora: expected it unused, got True; merge it with PEFT first"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: expected it unused"),
        ({"lora_bias": True}, "lora_bias: expected it unused"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: expected it unused"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base's weights"),
        ({"r": 0}, "r: expected a rank from 1 on, got 0"),
        ({"r": "4"}, "adapter_config.r: expected an integer"),
        ({"r": 5}, r"lora_A.weight: expected shape \[5, 72\], got \[4, 72\]"),
        ({"rank_pattern": {"(a*)*": 4}}, "pattern: expected a plain regular expression"),
        ({"alpha_pattern": {"(": 4}}, "pattern: expected a plain regular expression"),
    ],
)
def test_adapters_of_other_kinds_are_refused(base, tmp_path, config, message):
    refused(base, tmp_path, message, **config)


def test_what_would_not_be_merged_is_refused(base, tmp_path):
    name = f"base_model.model.{Q}.lora_A.weight"
    full = low_rank(Q, 4)
    refused(base, tmp_path, "expected lora_A and lora_B, got one of them", {name: full[name]})
    magnitude = {f"base_model.model.{Q}.lora_magnitude": random(144)}
    refused(base, tmp_path, "the model has no .*q_proj.lora_magnitude", full | magnitude)
    other = {key.replace("layers.1", "layers.7"): value for key, value in full.items()}
    refused(base, tmp_path, "the model has no model.layers.7.self_attn.q_proj.weight", other)
    refused(
        base, tmp_path, r"lora_B.weight: expected shape \[144, 4\]", full | {name.replace("_A", "_B"): random(9, 4)}
    )
    refused(base, tmp_path, r"expected base_model.model.\*", {"lora_A": random(4, 4)})
    refused(base, tmp_path, "it holds no tensors", {})
    norm = {key.replace(Q, "model.norm"): value for key, value in full.items()}
    refused(base, tmp_path, "expected additions to a matrix", norm)
    head = {"base_model.model.lm_head.weight": random(9, WIDTH)}
    refused(base, tmp_path, r"lm_head.weight: expected shape \[384, 72\], got \[9, 72\]", head)
    tied = pico.save(pico.build_model("llama", tie_word_embeddings=True), tmp_path / "tied")
    refused(tied, tmp_path, "embedding and head are one tensor here", head)


def test_what_is_no_adapter_is_refused(base, pico_file, tmp_path):
    with pytest.raises(InputError, match=r"no adapter_config.json; expected a folder that PEFT saved"):
        import_model(base, tmp_path / "out", adapter=tmp_path)
    adapter = save_adapter(tmp_path / "adapter", low_rank(Q, 4))
    with pytest.raises(InputError, match="expected a Hugging Face folder to merge it into"):
        import_model(pico_file, tmp_path / "out", adapter=adapter)
    with pytest.raises(InputError, match="which this job reads"):
        import_model(base, adapter / "adapter_model.safetensors", adapter=adapter, overwrite=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        import_model(base, tmp_path / "out", adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model.safetensors"):
        import_model(base, tmp_path / "out", adapter=adapter)


def test_the_command_line(base, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "adapter", low_rank(Q, 4))
    assert main(["import", str(base), "--adapter", str(adapter), "-o", str(tmp_path / "out"), "-q"]) == 0
    import_model(base, tmp_path / "expected", adapter=adapter)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()
    assert main(["import", str(base), "--adapter", str(tmp_path), "-o", str(tmp_path / "other"), "-q"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


KINDS = {
    "all linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"v_proj": 3, r"layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {"gate_proj": 20},
    },
    "rslora": {"target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    "head and bias": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_what_peft_merges(tmp_path, kind, family):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base = pico.save(pico.build_model(family), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **KINDS[kind]))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    import_model(base, tmp_path / "out", adapter=tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected, found = open_checkpoint(tmp_path / "merged"), open_checkpoint(tmp_path / "out")
    assert expected.spec == found.spec
    changed = 0
    for name in expected.spec.tensor_shapes():
        torch.testing.assert_close(found.tensor(name), expected.tensor(name), rtol=1e-5, atol=1e-5)
        changed += not found.tensor(name).equal(open_checkpoint(base).tensor(name))
    assert changed


def test_adapters_of_an_exported_folder(pico_file, tmp_path):
    """Of our own class: two FFNs in a layer, and one that lost its attention."""
    export = pytest.importorskip("depthprune_runtime.export.export", reason="there is no export")
    prune(pico_file, tmp_path / "p", drop="2.attention,4.ffn", repair="none")
    export.export_model(tmp_path / "p", tmp_path / "folder", "hf")
    names = load_file(tmp_path / "folder" / "model.safetensors")
    module = "model.layers.1.mlps.1.down_proj"
    weight = names[f"{module}.weight"]
    tensors = {
        f"base_model.model.{module}.lora_A.weight": random(4, weight.shape[1]),
        f"base_model.model.{module}.lora_B.weight": random(weight.shape[0], 4),
    }
    merged, plain = merge(tmp_path / "folder", tmp_path, tensors), open_checkpoint(tmp_path / "p")
    assert merged.spec == plain.spec and merged.plan == plain.plan
    changed = [name for name in plain.spec.tensor_shapes() if not merged.tensor(name).equal(plain.tensor(name))]
    assert changed == ["sublayers.4.down_proj.weight"]
    torch.testing.assert_close(merged.tensor(changed[0]), weight + 1.5 * product(tensors, module))
