"""Exported GGUF files: read back by our reader, and field by field by that of the gguf package."""

from __future__ import annotations

import dataclasses
import json

import gguf
import numpy as np
import pico
import pruned_pico
import pytest
import tokenizers
import torch

from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.checkpoint.gguf_tokenizer import gguf_assets
from depthprune_runtime.errors import InputError
from depthprune_runtime.export.export import export_model
from depthprune_runtime.export.gguf_tokenizer import add_tokenizer
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.spec import AttentionSpec

ARCHITECTURES = {
    "uniform": "llama",
    "tied": "llama",
    "rope": "llama",
    "wide_uniform": "llama",
    "bias": "qwen2",
    "qk_norm": "qwen3",
    "attention_only": "deci",
    "ffn_only": "deci",
    "ffns_first": "deci",
    "widths": "deci",
    "wide": "deci",
    "irregular_bias": "deci",
    "all_biases": "deci",
}
REFUSED = [name for name in pruned_pico.SHAPES if name not in ARCHITECTURES]


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_what_is_read_back(pruned, tmp_path, name):
    result = export_model(pruned(name), tmp_path / "out.gguf", "gguf")
    assert result.kind == ARCHITECTURES[name]
    assert result.distance is not None and result.distance < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("name", [name for name, arch in ARCHITECTURES.items() if arch != "deci"])
def test_uniform_files_are_read_back_equal(pruned, tmp_path, name):
    export_model(pruned(name), tmp_path / "out.gguf", "gguf", check=False)
    source, found = open_checkpoint(pruned(name)), open_checkpoint(tmp_path / "out.gguf", torch.float32)
    assert found.checksums() == source.checksums()
    count = len(source.spec.whole_blocks())
    renumbered = [dataclasses.replace(s, origin=(i,)) for i in range(count) for s in source.spec.sublayers[2 * i :][:2]]
    rope = found.spec.rope if name == "rope" else source.spec.rope
    assert found.spec == dataclasses.replace(source.spec, sublayers=tuple(renumbered), rope=rope)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_a_target_that_can(pruned, tmp_path, name):
    with pytest.raises(InputError, match="--to hf can") as error:
        export_model(pruned(name), tmp_path / "out.gguf", "gguf")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_deci_fields_of_attention_only_blocks(pruned, tmp_path):
    """Without FFNs 1, 2 and 5: llama.cpp would drop what those attentions add, so each gets an FFN of zeros."""
    export_model(pruned("attention_only"), tmp_path / "out.gguf", "gguf", check=False)
    found = fields(tmp_path / "out.gguf")
    assert found["general.architecture"] == "deci"
    assert found["deci.block_count"] == 6
    assert found["deci.attention.head_count"] == [9] * 6
    assert found["deci.attention.head_count_kv"] == [3] * 6
    assert found["deci.feed_forward_length"] == [80, 256, 256, 80, 80, 256]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 16
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert not np.any(tensors["blk.1.ffn_down.weight"].data) and np.any(tensors["blk.0.ffn_down.weight"].data)


def test_deci_fields_where_an_ffn_comes_first(pruned, tmp_path):
    """Blocks 0 and 1 without attention, block 3 without FFN: F F a F a aF aF."""
    export_model(pruned("ffns_first"), tmp_path / "out.gguf", "gguf", check=False)
    found = fields(tmp_path / "out.gguf")
    assert found["deci.attention.head_count"] == [1, 0, 9, 9, 9, 9]
    assert found["deci.attention.head_count_kv"] == [1, 0, 3, 3, 3, 3]
    assert found["deci.feed_forward_length"] == [80, 80, 80, 256, 80, 80]
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert not np.any(tensors["blk.0.attn_output.weight"].data)
    assert tensors["rope_freqs.weight"].data.shape == (8,)
    assert "blk.1.attn_q.weight" not in tensors


def test_deci_fields_of_mixed_widths(pruned, tmp_path):
    export_model(pruned("widths"), tmp_path / "out.gguf", "gguf", dtype="bf16")
    found = fields(tmp_path / "out.gguf")
    assert found["deci.attention.head_count"] == [9, 6, 3, 9, 9, 9]
    assert found["deci.attention.head_count_kv"] == [3, 2, 1, 3, 3, 3]
    assert found["deci.feed_forward_length"] == [80, 80, 48, 80, 256, 80]
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == gguf.GGMLQuantizationType.BF16
    assert kinds["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32


def test_query_rows_are_in_pairs(pruned, tmp_path):
    """Row 1 of a head in llama.cpp's order is row D/2 of ours."""
    export_model(pruned("wide"), tmp_path / "out.gguf", "gguf", check=False)
    source = open_checkpoint(pruned("wide"))
    index = next(i for i, s in enumerate(source.spec.sublayers) if isinstance(s, AttentionSpec) and s.num_heads == 18)
    rows = source.tensor(f"sublayers.{index}.qkv_proj.weight")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    stored = torch.from_numpy(tensors["blk.1.attn_q.weight"].data.copy())
    assert torch.equal(stored[0], rows[0]) and torch.equal(stored[1], rows[8]) and torch.equal(stored[2], rows[1])
    assert torch.equal(stored[16 * 17 + 15], rows[16 * 17 + 15])


def test_tied_embeddings_have_no_output_tensor(pruned, tmp_path):
    for name, there in (("ffn_only", False), ("widths", True)):
        export_model(pruned(name), tmp_path / f"{name}.gguf", "gguf", check=False)
        tensors = {t.name for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        assert ("output.weight" in tensors) == there


def test_tokenizer_and_template(pruned, tmp_path):
    export_model(pruned("wide"), tmp_path / "out.gguf", "gguf", check=False)
    source, found = open_checkpoint(pruned("wide")).assets, open_checkpoint(tmp_path / "out.gguf").assets
    ours = tokenizers.Tokenizer.from_str(source["tokenizer.json"].decode())
    theirs = tokenizers.Tokenizer.from_str(found["tokenizer.json"].decode())
    for text in ("the quick brown fox", "naïve façade — 東京 🙂", "<|user|>user: 123\n\n  it's", ""):
        assert theirs.encode(text).ids == ours.encode(text).ids
    assert found["chat_template.jinja"].decode() == pico.CHAT_TEMPLATE
    assert json.loads(found["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": 1}
    stored = fields(tmp_path / "out.gguf")
    assert len(stored["tokenizer.ggml.tokens"]) == pico.VOCAB_SIZE
    assert stored["tokenizer.ggml.add_bos_token"] is True and stored["tokenizer.ggml.add_eos_token"] is False


class Assets:
    """As much of a checkpoint as a tokenizer is."""

    name = "model"

    def __init__(self, assets, vocab_size):
        self.assets = assets
        self.spec = dataclasses.make_dataclass("Spec", ["vocab_size"])(vocab_size)


def written_fields(raw, config, vocab_size, path):
    writer = gguf.GGUFWriter(path, "llama")
    config = json.dumps(config).encode()
    add_tokenizer(
        writer, Assets({"tokenizer.json": raw.to_str().encode(), "tokenizer_config.json": config}, vocab_size)
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return fields(path)


def test_sentencepiece_vocabularies(tmp_path):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)),
                                           *"▁helowrd", "he", "ll", "hell", "hello", "▁hello", "or"])},
        merges=[("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("o", "r")],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    ))  # fmt: skip
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = written_fields(raw, names, 300, tmp_path / "out.gguf")
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and found["tokenizer.ggml.token_type"][-1] == 5
    assets = gguf_assets(tmp_path / "out.gguf", found, 300)
    again = tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode())
    for text in ("hello world", "hell or hello", "é x"):
        assert again.encode(text).tokens == raw.encode(text).tokens


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        ([tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "gpt-2"),
        (
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ],
            False,
            "smollm",
        ),
        (
            [
                tokenizers.pre_tokenizers.Split(
                    tokenizers.Regex(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    "isolated",
                ),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            True,
            "llama3",
        ),
    ],
)
def test_names_of_pre_tokenizers(tmp_path, pre_tokenizer, ignore_merges, name):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[], ignore_merges=ignore_merges))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(pre_tokenizer)
    assert written_fields(raw, {}, 4, tmp_path / "out.gguf")["tokenizer.ggml.pre"] == name


def test_a_tokenizer_without_a_name_is_refused(tmp_path):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    for step in (tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.Digits(individual_digits=False)):
        raw.pre_tokenizer = step
        with pytest.raises(InputError, match="cannot be told in GGUF"):
            written_fields(raw, {}, 4, tmp_path / "out.gguf")


def test_a_model_without_tokenizer(tmp_path):
    folder = pico.save(pico.build_model("llama"), tmp_path / "model", tokenizer=False)
    export_model(folder, tmp_path / "out.gguf", "gguf")
    assert fields(tmp_path / "out.gguf")["tokenizer.ggml.model"] == "no_vocab"


def llama_cpp_logits(library, path, ids):
    class Model(library.LlamaModel):
        n_vocab = pico.VOCAB_SIZE  # which cyllama asks its model for

    options = library.LlamaContextParams()
    options.n_ctx, options.n_batch, options.n_threads = 64, 64, 1
    options.type_k = options.type_v = 0  # float32
    context = library.LlamaContext(Model(str(path), library.LlamaModelParams(), verbose=False), options, verbose=False)
    batch = library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for position, token in enumerate(ids):
        batch.add(token, position, [0], True)
    context.decode(batch)
    return torch.tensor([list(context.get_logits_ith(position)) for position in range(len(ids))])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_computes_the_same(pruned, tmp_path, name):
    reason = "llama.cpp is not installed: pip install cyllama"
    library = pytest.importorskip("cyllama.llama.llama_cpp", reason=reason)
    library.disable_logging()
    export_model(pruned(name), tmp_path / "out.gguf", "gguf", check=False)
    ids = list(range(3, 40))
    source = open_checkpoint(pruned(name))
    decoder = Decoder(source.spec, source.tensor, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        wanted = decoder.logits(decoder.hidden_states(torch.tensor(ids), packed([len(ids)], torch.device("cpu"))))
    found = llama_cpp_logits(library, tmp_path / "out.gguf", ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
