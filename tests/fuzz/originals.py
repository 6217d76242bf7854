"""What is mutated: one small model in every format we read, a search state, and folders of other decoders."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.gguf_file import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, Field, GGUFFile, Info

IDS = (5, 17, 40, 61, 99)
TEXT = "the quick brown"
MESSAGES = [{"role": "user", "content": "a fox"}]
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_CALIBRATION = "the quick brown fox jumps over the lazy dog, prune the blocks that change the hidden state least. " * 40
_NEW_TOKENS = 6


@dataclass
class Original:
    """files: name -> contents; target: the file to open, "." for the folder; beside: files that a use needs, by name,
    which mutants leave alone."""

    format: str
    name: str
    files: dict[str, bytes]
    target: str
    beside: dict[str, bytes] = field(default_factory=dict)
    baseline: Any = None


def _read(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def _greedy(model: Any) -> list[int]:
    import torch

    ids = list(IDS)
    with torch.no_grad():
        for _ in range(_NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(IDS) :]


def _build_model(family: str) -> Any:
    """A model whose generation config ends a greedy output early, so that a lost end token shows."""
    import pico

    sizes = dict(_SIZES) | ({"sliding_window": 4} if family == "mistral" else {})
    model = pico.build_model(family, **sizes)
    model.generation_config.eos_token_id = [1, _greedy(model)[3]]
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.top_k = 40
    model.generation_config.top_p = 0.9
    return model


def _tensor_name(name: str) -> str:
    """Hugging Face's name -> llama.cpp's."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if name in whole:
        return whole[name]
    _, _, block, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{block}.{parts[part]}.{kind}"


def _gguf(model: Any, tokenizer: Any) -> bytes:
    """What llama.cpp's converter writes for `model`, in float32."""
    config, arch = model.config, model.config.model_type
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {i: t for t, i in state["model"]["vocab"].items()} | {t["id"]: t["content"] for t in state["added_tokens"]}
    tokens = [by_id.get(i, f"[PAD{i}]").encode() for i in range(config.vocab_size)]
    special = {t["id"] for t in state["added_tokens"]}
    types = [3 if i in special else 1 if i in by_id else 5 for i in range(config.vocab_size)]
    merges = [(m if isinstance(m, str) else " ".join(m)).encode() for m in state["model"]["merges"]]
    fields = [
        Field(b"general.architecture", STRING, arch.encode()),
        Field(b"general.name", STRING, b"pico"),
        Field(b"general.file_type", UINT32, 0),
        Field(f"{arch}.context_length".encode(), UINT32, config.max_position_embeddings),
        Field(f"{arch}.embedding_length".encode(), UINT32, config.hidden_size),
        Field(f"{arch}.block_count".encode(), UINT32, config.num_hidden_layers),
        Field(f"{arch}.feed_forward_length".encode(), UINT32, config.intermediate_size),
        Field(f"{arch}.attention.head_count".encode(), UINT32, config.num_attention_heads),
        Field(f"{arch}.attention.head_count_kv".encode(), UINT32, config.num_key_value_heads),
        Field(f"{arch}.attention.layer_norm_rms_epsilon".encode(), FLOAT32, config.rms_norm_eps),
        Field(f"{arch}.rope.freq_base".encode(), FLOAT32, config.rope_parameters["rope_theta"]),
        Field(b"tokenizer.ggml.model", STRING, b"gpt2"),
        Field(b"tokenizer.ggml.pre", STRING, b"gpt-2"),
        Field(b"tokenizer.ggml.tokens", ARRAY, tokens, STRING),
        Field(b"tokenizer.ggml.token_type", ARRAY, types, INT32),
        Field(b"tokenizer.ggml.merges", ARRAY, merges, STRING),
        Field(b"tokenizer.ggml.bos_token_id", UINT32, 0),
        Field(b"tokenizer.ggml.eos_token_id", UINT32, model.generation_config.eos_token_id[1]),
        Field(b"tokenizer.ggml.add_bos_token", BOOL, 1),
        Field(b"tokenizer.chat_template", STRING, tokenizer.chat_template.encode()),
    ]
    infos, data = [], bytearray()
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        target = _tensor_name(name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(target.split(".")[-2])
        if heads and arch == "llama":  # interleaved rotary order
            shape = values.shape
            values = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)
        infos.append(Info(target.encode(), list(values.shape[::-1]), 0, len(data)))
        flat = values.flatten().tolist()
        data += struct.pack(f"<{len(flat)}f", *flat)
        data += bytes(-len(data) % 32)
    return GGUFFile(fields, infos, bytes(data)).assemble()


def _byte_fallback(folder: Path) -> None:
    """Replace a folder's tokenizer by one of Llama 2's kind: metaspace, and bytes where no piece fits."""
    import tokenizers

    vocab = {"<unk>": 2, "<s>": 0, "</s>": 1}
    vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ("▁", "▁the", "▁a", "a", "b", "e", "h", "t", "th", "▁world", "Hello", "é", "東"):
        vocab[piece] = len(vocab)
    merges = [("t", "h")]
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.save(str(folder / "tokenizer.json"))


def build(folder: Path) -> list[Original]:
    """Every original, made in `folder`. To be run in a child: it computes."""
    import pico
    import torch

    from depthprune_runtime import FinerCutOptions, import_model, prune, quantize

    torch.set_num_threads(1)
    text = folder / "calibration.txt"
    text.write_text(_CALIBRATION)
    few: dict[str, Any] = {"calibration": str(text), "samples": 2, "seq_len": 16}
    originals: list[Original] = []

    def add(format: str, name: str, files: Mapping[str, bytes], target: str, **beside: bytes) -> None:
        originals.append(Original(format, name, dict(files), target, {"calibration.txt": text.read_bytes(), **beside}))

    for family in pico.FAMILIES:
        model = _build_model(family)
        path = pico.save(model, folder / family)
        add("huggingface", family, _read(path), ".")
        if family in ("llama", "qwen2"):
            add("gguf", family, {"model.gguf": _gguf(model, pico.build_tokenizer())}, "model.gguf")
        if family == "qwen3":
            cut = pico.save(model, folder / "cut", max_shard_size="120KB")
            assert (cut / "model.safetensors.index.json").is_file()
            add("huggingface", "shards", _read(cut), ".")
    source = folder / "llama"

    def native(format: str, name: str, make: Any) -> dict[str, bytes]:
        place = folder / f"{format} {name}"
        place.mkdir()
        make(place / "model.safetensors")
        add(format, name, _read(place), "model.safetensors")
        return originals[-1].files

    dense = native("native", "dense", lambda p: import_model(source, p))
    native("native", "finercut", lambda p: prune(source, p, "finercut", sublayers=2, repair="none", **few))
    native("native", "flattened", lambda p: prune(source, p, "flattengpt", blocks=1, repair="none", **few))
    native("shards", "dense", lambda p: import_model(folder / "qwen2", p, max_shard_size="150KB"))
    native("shards", "int8", lambda p: quantize(source, p, 8, max_shard_size="40KB"))
    native("quantized", "int8", lambda p: quantize(folder / "qwen3", p, 8))
    native("quantized", "int4", lambda p: quantize(source, p, 4, symmetric=False, method="rtn"))
    for name in ("exact", "fast"):
        state = folder / f"{name}.json"
        options = FinerCutOptions(state_file=str(state), fast=name == "fast")
        prune(source, folder / f"{name}.safetensors", sublayers=1, options=options, repair="none", **few)
        made = {"state.json": state.read_bytes()}
        add("state", name, made, "state.json", **{"model.safetensors": dense["model.safetensors"]})
    _byte_fallback(source)
    native("requests", "byte fallback", lambda p: import_model(source, p))
    originals.append(Original("requests", "byte level", dense, "model.safetensors"))
    originals += _other_decoders(folder, text.read_bytes())
    return originals


def _other_decoders(folder: Path, text: bytes) -> list[Original]:
    import pico
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "mamba": {"state_size": 4},
        "rwkv": {"intermediate_size": 40, "context_length": 64, "rescale_every": 0},
    }
    made = []
    for family, more in sizes.items():
        torch.manual_seed(0)
        common = {"vocab_size": pico.VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 3, "eos_token_id": 1}
        config = AutoConfig.for_model(family, **common, bos_token_id=0, pad_token_id=1, **more)
        path = pico.save(AutoModelForCausalLM.from_config(config).eval(), folder / family)
        made.append(Original("other", family, _read(path), ".", {"calibration.txt": text}))
    return made
