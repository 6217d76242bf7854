"""Models of bench_cpu.py from one set of bf16 weights: our own files and pruned shapes, Hugging Face folder, GGUF."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from depthprune_runtime import import_model
from depthprune_runtime.checkpoint import Checkpoint, NativeCheckpoint, write_native
from depthprune_runtime.families import GGUF_NAMES, HF_NAMES, source_names
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.pruning.plan import Drop, Edit, Flatten, Narrow, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec


@dataclass(frozen=True)
class Model:
    """tokens: new ones of a decode run. The shapes of three plans; FlattenGPT merges the pairs, narrow and wide.

    shortgpt: blocks, finercut: sub-layers, both at least a quarter of all parameters; flattengpt: first blocks of the
    pairs, narrowed at least a fifth.
    """

    name: str
    tokens: int
    shortgpt: tuple[int, ...]
    finercut: tuple[int, ...]
    flattengpt: tuple[int, ...]

    def plans(self, spec: DecoderSpec) -> dict[str, tuple[Edit, ...]]:
        """Only the shapes matter to speed: which units stay when narrowing, does not."""
        merges: tuple[Edit, ...] = tuple(Flatten((b, b + 1)) for b in self.flattengpt)
        narrow: list[Edit] = []
        blocks = block_pairs(spec)
        for block in self.flattengpt:
            for index in blocks[block]:
                own = spec.sublayers[index]
                units = own.num_kv_heads if isinstance(own, AttentionSpec) else own.intermediate_size
                narrow.append(Narrow(index, tuple(range(units))))
        return {
            "shortgpt 25%": tuple(Drop(i) for b in self.shortgpt for i in blocks[b]),
            "finercut 25%": tuple(Drop(i) for i in self.finercut),
            "flattengpt 20%": (*merges, *narrow),
            "flattengpt wide": merges,
        }


# SmolLM2's plans are what the methods chose without repair from 4 windows of 64 tokens; those of the random weights
# are made up after them: FinerCut drops more attention than FFNs.
MODELS = {
    "smollm2-135m": Model(
        "smollm2-135m",
        tokens=128,
        shortgpt=(3, 4, 12, 13, 14, 15, 16, 17, 25, 26),
        finercut=(24, 25, 26, 27, 28, 29, 31, 32, 33, 34, 35, 36, 43, 44, 46, 50, 51, 52, 55, 58),
        flattengpt=(3, 5, 7, 9, 12, 14, 17, 25),
    ),
    "random-llama-1b": Model(
        "random-llama-1b",
        tokens=24,
        shortgpt=(9, 10, 11, 12, 13),
        finercut=(14, 16, 18, 19, 20, 21, 22, 23, 24, 25, 26, 28),
        flattengpt=(2, 5, 8, 11),
    ),
}
VARIANTS = ("dense", "shortgpt 25%", "finercut 25%", "flattengpt 20%", "flattengpt wide")


class RandomCheckpoint(Checkpoint):
    """Weights of a 1B Llama's shape, the same at every call."""

    name = "random-llama-1b"
    dtype = torch.bfloat16
    provenance = {"source": "random", "format": "random", "family": "llama", "blocks": 16}  # noqa: RUF012
    assets: Mapping[str, bytes] = {}  # type: ignore[assignment]

    def __init__(self) -> None:
        sublayers = [s for b in range(16) for s in (AttentionSpec(32, 8, 64, (b,)), FFNSpec(8192, (b,)))]
        self.spec = DecoderSpec(2048, 32000, 4096, 1e-5, RopeSpec(theta=500000.0), False, tuple(sublayers))

    def tensor(self, name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        shape = self.spec.tensor_shapes()[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype)
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 0.03).to(self.dtype)


class Source(Protocol):
    """A spec and its tensors."""

    @property
    def spec(self) -> DecoderSpec: ...

    def tensor(self, name: str) -> Tensor: ...


def write_dense(model: Model, gguf: Path | None, path: Path) -> None:
    """Our own file. gguf: SmolLM2's weights; the random model needs none."""
    if model.name == RandomCheckpoint.name:
        write_native(path, RandomCheckpoint())
    else:
        assert gguf is not None
        import_model(gguf, path, dtype=torch.bfloat16)


def write_pruned(model: Model, dense: Path, variant: str, path: Path) -> None:
    parent = NativeCheckpoint(dense, verify=False)
    plan = PrunePlan(variant.split(maxsplit=1)[0], "0" * 64, model.plans(parent.spec)[variant])
    with torch.inference_mode():
        write_native(path, PrunedCheckpoint(parent, plan))


def unpacked(checkpoint: Source, table: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names in `table`, packed projections cut apart."""
    for name in checkpoint.spec.tensor_shapes():
        names, tensor = source_names(table, checkpoint.spec, name), checkpoint.tensor(name)
        rows = [tensor.shape[0] // len(names)] * len(names)
        if name.endswith("qkv_proj.weight"):
            attention = checkpoint.spec.attention_sublayers()[0]
            rows = [attention.q_size, attention.kv_size, attention.kv_size]
        yield from zip(names, tensor.split(rows), strict=True)


def huggingface_config(spec: DecoderSpec) -> dict[str, Any]:
    """config.json of a Llama of this shape; `spec` is dense."""
    attention, ffn = spec.attention_sublayers()[0], spec.ffn_sublayers()[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": ffn.intermediate_size,
        "num_hidden_layers": len(spec.ffn_sublayers()),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta},
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_huggingface(dense: Path, folder: Path) -> None:
    """A Llama folder that Transformers reads, with the tokenizer that the file carries, if any."""
    from safetensors.torch import save_file

    checkpoint = NativeCheckpoint(dense, verify=False)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface_config(checkpoint.spec), indent=2))
    for name, data in checkpoint.assets.items():
        (folder / name).write_bytes(data)
    tensors = {name: part.contiguous() for name, part in unpacked(checkpoint, HF_NAMES)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_gguf(dense: Path, path: Path) -> None:
    """bf16 matrices and float32 norms; without a vocabulary, since all prompts are token ids."""
    import gguf

    checkpoint = NativeCheckpoint(dense, verify=False)
    spec = checkpoint.spec
    attention, ffn = spec.attention_sublayers()[0], spec.ffn_sublayers()[0]
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_block_count(len(spec.ffn_sublayers()))
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(ffn.intermediate_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, part in unpacked(checkpoint, GGUF_NAMES):
        heads = {"attn_q": attention.num_heads, "attn_k": attention.num_kv_heads}.get(name.split(".")[-2])
        tensor = part if heads is None else _interleaved(part, heads)
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(rows: Tensor, heads: int) -> Tensor:  # [heads * D, C]
    """Rows of each head from halves (0, 1, ..) to llama.cpp's rotary pairs (0, D/2, 1, D/2 + 1, ...)."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
