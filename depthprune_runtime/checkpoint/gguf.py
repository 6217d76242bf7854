"""GGUF models of the architectures llama and qwen2, dequantised tensor by tensor.

Source of the format: the GGUF specification of ggml. llama.cpp stores the query and key rows of llama
models in interleaved rotary order; they are put back into half-split order here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint.base import GENERATION_CONFIG_FILE, Checkpoint
from depthprune_runtime.checkpoint.huggingface import tokenizer_assets
from depthprune_runtime.errors import InputError
from depthprune_runtime.families import GGUF_NAMES, decoder_spec, source_names
from depthprune_runtime.spec import AttentionSpec

_ARCHITECTURES = ("llama", "qwen2")
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint(Checkpoint):
    """A dense model in a GGUF file. dtype: what to dequantise to; bf16 by default."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        from gguf import GGUFReader

        self.name = path.name
        self.path = path
        self.source_files = (path,)
        try:
            self._reader = GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise InputError(f"{path}: truncated, damaged or not a GGUF file: {error}") from error
        self._tensors = {t.name: t for t in self._reader.tensors}
        self.dtype = dtype if dtype is not None else torch.bfloat16
        config = self._config()
        try:
            self.spec = decoder_spec(config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self._interleaved = config["model_type"] == "llama"
        quantizations = sorted({t.tensor_type.name for t in self._reader.tensors})
        self.provenance = {
            "source": self.name,
            "format": "gguf",
            "family": config["model_type"],
            "blocks": config["num_hidden_layers"],
            "dequantized_from": quantizations,
        }

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _config(self) -> dict[str, Any]:
        """The file's metadata as a Hugging Face config."""
        arch = self._field("general.architecture")
        if arch not in _ARCHITECTURES:
            raise InputError(f"{self.path}: general.architecture: expected one of {_ARCHITECTURES}, got {arch!r}")

        def required(key: str) -> Any:
            value = self._field(f"{arch}.{key}")
            if value is None:
                raise InputError(f"{self.path}: metadata key {arch}.{key} is missing")
            return value

        if self._field(f"{arch}.expert_count", 0):
            raise InputError(f"{self.path}: mixture-of-experts models are not supported")
        if "token_embd.weight" not in self._tensors:
            raise InputError(f"{self.path}: tensor token_embd.weight is missing")
        num_heads = required("attention.head_count")
        head_dim = self._field(f"{arch}.attention.key_length") or required("embedding_length") // num_heads
        rotated = self._field(f"{arch}.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise InputError(f"{self.path}: rope.dimension_count: expected head_dim {head_dim}, got {rotated}")
        return {
            "model_type": arch,
            "hidden_size": required("embedding_length"),
            "intermediate_size": required("feed_forward_length"),
            "num_hidden_layers": required("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._field(f"{arch}.attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "max_position_embeddings": required("context_length"),
            # stored as float32; its shortest decimal is the value the model was trained with
            "rms_norm_eps": float(f"{required('attention.layer_norm_rms_epsilon'):.6g}"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in self._tensors,
            "rope_parameters": self._rope(arch),
        }

    def _rope(self, arch: str) -> dict[str, Any]:
        theta = float(self._field(f"{arch}.rope.freq_base", 10000.0))
        if _ROPE_FACTORS in self._tensors:
            factors = self._dequantized(_ROPE_FACTORS).double().tolist()
            return {"rope_theta": theta, "rope_type": "factors", "factors": factors}
        kind = self._field(f"{arch}.rope.scaling.type", "none")
        if kind == "none":
            return {"rope_theta": theta, "rope_type": "default"}
        return {"rope_theta": theta, "rope_type": kind, "factor": self._field(f"{arch}.rope.scaling.factor", 1.0)}

    def _dequantized(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors.get(name)
        if tensor is None:
            raise InputError(f"{self.path}: tensor {name} is missing")
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{self.path}: {name}: cannot dequantise {tensor.tensor_type.name}: {error}") from error
        shape = [int(n) for n in reversed(tensor.shape)]
        return torch.from_numpy(values.reshape(shape).copy())

    def _part(self, source: str) -> Tensor:
        values = self._dequantized(source).to(self.dtype)
        attention = self.spec.attention_sublayers()[0]
        if self._interleaved and ".attn_q." in source:
            return _half_split(values, attention, attention.num_heads)
        if self._interleaved and ".attn_k." in source:
            return _half_split(values, attention, attention.num_kv_heads)
        return values

    def tensor(self, name: str) -> Tensor:
        shape = self.spec.tensor_shapes()[name]
        parts = [self._part(n) for n in source_names(GGUF_NAMES, self.spec, name)]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tuple(packed.shape) != shape:
            raise InputError(f"{self.path}: {name}: expected shape {list(shape)}, got {list(packed.shape)}")
        return packed.contiguous()

    @functools.cached_property
    def _assets(self) -> dict[str, bytes]:
        if self._field("tokenizer.ggml.model") in (None, "no_vocab", "none"):  # a file of weights alone
            return {}
        try:
            assets = tokenizer_assets(self.path.parent, gguf_file=self.path.name)
        except Exception as error:  # the converters raise many types on vocabularies they do not know
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.path}: its tokenizer cannot be converted: {reason}") from error
        ids = {
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }
        known = {k: int(v) for k, v in ids.items() if v is not None}
        assets[GENERATION_CONFIG_FILE] = json.dumps(known).encode()
        return assets

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._assets


def _half_split(values: Tensor, attention: AttentionSpec, heads: int) -> Tensor:  # [heads * D, ...]
    """Rows of each head from interleaved pairs (0, D/2, 1, D/2 + 1, ...) to halves (0, 1, ..)."""
    pairs = values.view(heads, attention.head_dim // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def is_gguf(path: Path) -> bool:
    """Whether the file begins with GGUF's magic."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
