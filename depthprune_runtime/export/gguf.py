"""GGUF files: llama, qwen2 or qwen3 where the model is uniform, else deci, whose blocks have widths of their own.

Sources: the GGUF specification; for what llama.cpp does with it, its src/models/deci.cpp and its converter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, LlamaFileType, RopeScalingType
from gguf.gguf_writer import WriterState
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.container import TensorEntry
from depthprune_runtime.checkpoint.paired_layout import numbered, paired_blocks
from depthprune_runtime.errors import InputError
from depthprune_runtime.export.gguf_tokenizer import add_tokenizer
from depthprune_runtime.export.huggingface import per_head_gains
from depthprune_runtime.export.padding import PaddedCheckpoint, Slot
from depthprune_runtime.export.parts import Unpacked
from depthprune_runtime.export.rope import divisors
from depthprune_runtime.families import GGUF_NAMES, source_shapes
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec

INTERLEAVED = ("llama", "deci")  # architectures whose rotary pairs are neighbours
_ROPE_FACTORS = "rope_freqs.weight"
_STUB_WIDTH = 256  # of an FFN of zeros: what every quantisation of llama.cpp takes
_KINDS = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def refuses(spec: DecoderSpec) -> str | None:
    """Why no GGUF architecture computes `spec`; None where one does."""
    attentions = spec.attention_sublayers()
    if not attentions:
        return "a GGUF model needs an attention, and the model has none"
    if len({attention.head_dim for attention in attentions}) > 1:
        return "a GGUF file has one head_dim, the model has several"
    if any((a.sliding_window or spec.max_position_embeddings) < spec.max_position_embeddings for a in attentions):
        return "llama.cpp's architectures for such models have no sliding window"
    if any(attention.qk_norm for attention in attentions) and architecture(spec) != "qwen3":
        return "llama.cpp has no architecture with q/k-norm in blocks that differ"
    if any(attention.qk_norm and len(attention.origin) > 1 for attention in attentions):
        return "llama.cpp has no architecture whose q/k-norm gains differ by head, as those of merged blocks do"
    return None


def architecture(spec: DecoderSpec) -> str:
    """What llama.cpp should run it as: deci is the one whose blocks may differ."""
    uniform = spec.uniform()
    if uniform is None or uniform[2].down_bias:
        return "deci"
    biases = (uniform[1].qkv_bias, uniform[1].o_bias)
    if uniform[1].qk_norm:
        return "deci" if any(biases) else "qwen3"
    return {(True, False): "qwen2", (True, True): "llama", (False, False): "llama"}.get(biases, "deci")


def slots(spec: DecoderSpec) -> list[Slot]:
    """`spec` with what deci needs: an attention in the first block, and an FFN behind every attention.

    llama.cpp reads the head size from the first block, and drops what an attention without an FFN adds.
    """
    head_dim = spec.attention_sublayers()[0].head_dim
    made = []
    for number, (attention, ffn) in enumerate(paired_blocks(spec)):
        if attention is not None:
            made.append(Slot(spec.sublayers[attention], attention))
        elif number == 0:
            made.append(Slot(AttentionSpec(1, 1, head_dim, (0,)), None))
        made.append(Slot(FFNSpec(_STUB_WIDTH, (0,)), None) if ffn is None else Slot(spec.sublayers[ffn], ffn))
    return made


def interleaved(rows: Tensor, head_dim: int) -> Tensor:  # [H * D, ...]
    """Rows of each head from halves (0, 1, ..) to pairs (0, D/2, 1, D/2 + 1, ...)."""
    halves = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class _Model:
    """What is written: `source` in the blocks of `arch`, its tensors under their names there."""

    source: Checkpoint
    arch: str
    dtype: torch.dtype
    tensors: Unpacked

    @property
    def spec(self) -> DecoderSpec:
        return self.source.spec

    @property
    def head_dim(self) -> int:
        return self.spec.attention_sublayers()[0].head_dim

    def tensor(self, name: str) -> Tensor:
        tensor = self.tensors.tensor(name)
        if self.arch in INTERLEAVED and (".attn_q." in name or ".attn_k." in name):
            return interleaved(tensor, self.head_dim)
        return tensor


def _model(checkpoint: Checkpoint, dtype: torch.dtype, on_tensor: Callable[[], None]) -> _Model:
    arch = architecture(checkpoint.spec)
    if arch == "qwen3" and per_head_gains(checkpoint):
        raise InputError(
            f"{checkpoint.name}: GGUF: llama.cpp has no architecture whose q/k-norm gains differ by head; --to hf can"
        )
    source = PaddedCheckpoint(checkpoint, slots(checkpoint.spec)) if arch == "deci" else checkpoint
    parts = source_shapes(GGUF_NAMES, numbered(source.spec))
    # vectors in float32, as llama.cpp's operators want them
    return _Model(source, arch, dtype, Unpacked(source, parts, dtype, on_tensor, torch.float32))


def _add_shape(writer: GGUFWriter, model: _Model) -> None:
    spec = model.spec
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    blocks = paired_blocks(spec)
    writer.add_block_count(len(blocks))
    heads, kv_heads, widths = [], [], []
    for attention, ffn in blocks:
        own = None if attention is None else spec.sublayers[attention]
        heads.append(own.num_heads if isinstance(own, AttentionSpec) else 0)
        kv_heads.append(own.num_kv_heads if isinstance(own, AttentionSpec) else 0)
        other = None if ffn is None else spec.sublayers[ffn]
        widths.append(other.intermediate_size if isinstance(other, FFNSpec) else 0)
    same = model.arch != "deci"
    writer.add_head_count(heads[0] if same else heads)
    writer.add_head_count_kv(kv_heads[0] if same else kv_heads)
    writer.add_feed_forward_length(widths[0] if same else widths)


def _rope_tensor(model: _Model) -> Tensor | None:  # [D/2] float32
    """Divisors of the frequencies, where their rule is none of GGUF's."""
    rope = model.spec.rope
    if rope.kind in ("default", "linear"):
        return None
    return torch.tensor(divisors(rope, model.head_dim), dtype=torch.float32)


def _add_rope(writer: GGUFWriter, model: _Model) -> None:
    rope = model.spec.rope
    writer.add_rope_freq_base(float(rope.theta))
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope.factor))


def _bytes(tensor: Tensor) -> Any:
    """As an array of the writer's; numpy has no bfloat16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return np.dtype(np.uint16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))


def write(checkpoint: Checkpoint, file: BinaryIO, dtype: torch.dtype, on_tensor: Callable[[], None], title: str) -> str:
    """Write `checkpoint`, which `refuses` lets pass, into the empty `file`; returns the architecture."""
    model = _model(checkpoint, dtype, on_tensor)
    writer = GGUFWriter(None, model.arch)
    writer.add_name(title)
    writer.add_file_type(_KINDS[dtype][1])
    _add_shape(writer, model)
    _add_rope(writer, model)
    add_tokenizer(writer, checkpoint)
    rope = _rope_tensor(model)
    entries = list(model.tensors.entries)
    if rope is not None:
        entries.insert(0, TensorEntry(_ROPE_FACTORS, rope.dtype, tuple(rope.shape)))
    for entry in entries:
        kind = _KINDS[entry.dtype][0]
        writer.add_tensor_info(entry.name, entry.shape, _numpy_dtype(entry.dtype), entry.nbytes, kind)
    opened: Any = [file]
    writer.fout, writer.state = opened, WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        tensor = rope if entry.name == _ROPE_FACTORS else model.tensor(entry.name)
        assert tensor is not None
        writer.write_tensor_data(_bytes(tensor))
    writer.flush()
    return model.arch
