"""GGUF models of `families.GGUF_FAMILIES`, dequantised tensor by tensor.

llama.cpp stores the query and key rows of some families in interleaved rotary order; they are put back into half-split
order here. Nothing is taken from outside the file but the other parts of a split one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from depthprune_runtime.checkpoint.dense import DenseCheckpoint, StoredTensor, check_block_count, check_tensors
from depthprune_runtime.checkpoint.gate import reading
from depthprune_runtime.checkpoint.gguf_header import GGUFHeader, is_gguf
from depthprune_runtime.checkpoint.gguf_split import read_gguf_parts
from depthprune_runtime.checkpoint.gguf_tokenizer import gguf_assets
from depthprune_runtime.checkpoint.mapped import WatchedFile
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families import GGUF_FAMILIES, Folds, GGUFForm, decoder_spec, rope_from_config
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec

__all__ = ["GGUFCheckpoint", "is_gguf"]

_DECI = GGUFForm("deci", interleaved=True)  # no family: its metadata say every block's widths
_ROPE_FACTORS = "rope_freqs.weight"
_SHORT_FACTORS, _LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"  # of longrope
_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
_PIECE = 1 << 18  # elements, a multiple of every block size; 1 MiB in float32
# metadata under which llama.cpp computes something else than the layers here
_UNSUPPORTED = ("attention.scale", "logit_scale", "residual_scale", "embedding_scale", "attention.clamp_kqv")


def _form(arch: str) -> GGUFForm:
    """How files of the known architecture `arch` are."""
    form = GGUF_FAMILIES[arch].gguf if arch in GGUF_FAMILIES else None
    return form or _DECI


class GGUFCheckpoint(DenseCheckpoint):
    """A dense model in a GGUF file. dtype: what to dequantise to; bf16 by default."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self.name = path.name
        self.path = self.where = path
        headers = read_gguf_parts(path)
        self.source_files = tuple(header.path for header in headers)
        self._metadata = headers[0].metadata
        self._homes: dict[str, GGUFHeader] = {name: header for header in headers for name in header.tensors}
        kinds = sorted({t.kind.name for header in headers for t in header.tensors.values()})
        self.watched = tuple(WatchedFile(file) for file in self.source_files)
        self.dtype = dtype if dtype is not None else torch.bfloat16
        with reading(path):
            arch = self._architecture()
            spec, folds = (self._deci_spec(), {}) if arch == "deci" else self._family_spec(arch)
            form = _form(arch)
            self._set_parts(form.names, spec, folds)
        stored = {
            name: StoredTensor(header.tensors[name].kind.name, header.tensors[name].shape)
            for name, header in self._homes.items()
        }
        used = [name for name in (_ROPE_FACTORS, _SHORT_FACTORS, _LONG_FACTORS) if name in stored]
        # every type stands for real numbers; one that the gguf package does not know is refused when it is read
        check_tensors(path, self._parts, stored, kinds, used)
        self._interleaved = form.interleaved
        self.provenance = {
            "source": self.name,
            "format": "gguf",
            "family": GGUF_FAMILIES[arch].model_type if arch in GGUF_FAMILIES else arch,
            "blocks": self._number(f"{arch}.block_count", int),
            "dequantized_from": kinds,
        }

    def _scalar(self, key: str, default: Any = None) -> Any:
        """Value `key` of the metadata, which is no array."""
        value = self._metadata.get(key, default)
        if isinstance(value, list):
            raise InputError(f"{self.path}: {key}: expected one value, got an array of {len(value)}")
        return value

    def _count(self, key: str, blocks: int, default: Any = None) -> int:
        """Positive integer `key`, which holds one for all blocks, or an array of equal ones, one a block."""
        value = self._metadata.get(key, default)
        if not isinstance(value, list):
            return int(self._number(key, int, default))
        counts = self._counts(key, blocks)
        if len(set(counts)) != 1:
            raise InputError(f"{self.path}: {key}: blocks that differ are not supported, got {printable(value)}")
        if not counts[0]:
            raise InputError(f"{self.path}: {key}: expected positive numbers, got {printable(value)}")
        return counts[0]

    def _number(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Positive number `key` of the metadata."""
        value = self._scalar(key, default)
        if value is None:
            raise InputError(f"{self.path}: metadata key {key} is missing")
        if kinds is float and isinstance(value, int) and not isinstance(value, bool):
            # the bits of a float read as an integer would be a number, too
            raise InputError(f"{self.path}: {key}: expected a number stored as a float, got the integer {value}")
        number: Any = value if isinstance(value, kinds) and not isinstance(value, bool) else 0
        if not number > 0:
            raise InputError(f"{self.path}: {key}: expected a positive number, got {printable(repr(value))}")
        return number

    def _counts(self, key: str, blocks: int) -> list[int]:
        """`blocks` counts from 0 on under `key`, which holds a list of them or one for all."""
        value = self._metadata.get(key)
        listed: list[Any] = value if isinstance(value, list) else [value] * blocks
        if len(listed) != blocks or not all(type(count) is int and count >= 0 for count in listed):
            raise InputError(f"{self.path}: {key}: expected {blocks} counts, one a block, got {printable(repr(value))}")
        return listed

    def _architecture(self) -> str:
        """The file's architecture, of which nothing is known to be unsupported."""
        arch = self._metadata.get("general.architecture")
        known = sorted({*GGUF_FAMILIES, _DECI.architecture})
        if not isinstance(arch, str) or arch not in known:
            raise InputError(f"{self.path}: general.architecture: expected one of {known}, got {printable(repr(arch))}")
        if self._metadata.get(f"{arch}.expert_count"):
            raise InputError(f"{self.path}: mixture-of-experts models are not supported")
        refused = [key for key in _UNSUPPORTED if key not in _form(arch).reads]
        if unsupported := [key for key in refused if self._metadata.get(f"{arch}.{key}")]:
            raise InputError(f"{self.path}: {arch}.{unsupported[0]} is not supported")
        if "token_embd.weight" not in self._homes:
            raise InputError(f"{self.path}: tensor token_embd.weight is missing")
        return str(arch)

    def _deci_spec(self) -> DecoderSpec:
        """Blocks that may lack a half, each with its own widths."""

        def integer(key: str) -> int:
            return int(self._number(f"deci.{key}", int))

        blocks = integer("block_count")
        check_block_count(blocks, self._homes, f"{self.path}: deci.block_count")
        heads, kv_heads, widths = (
            self._counts(f"deci.{key}", blocks)
            for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        )
        width = integer("embedding_length")
        head_dim = int(self._number("deci.attention.key_length", int, width // heads[0] if heads[0] else None))
        sublayers: list[AttentionSpec | FFNSpec] = []
        for block, (count, kv_count, ffn_width) in enumerate(zip(heads, kv_heads, widths, strict=True)):
            if count and not kv_count:
                raise InputError(f"{self.path}: block {block}: attention replaced by a linear layer is not supported")
            biases = [f"blk.{block}.{part}.bias" in self._homes for part in ("attn_q", "attn_output", "ffn_down")]
            if count:
                sublayers.append(AttentionSpec(count, kv_count, head_dim, (block,), biases[0], biases[1]))
            if ffn_width:
                sublayers.append(FFNSpec(ffn_width, (block,), down_bias=biases[2]))
        epsilon = self._number("deci.attention.layer_norm_rms_epsilon", float)
        return DecoderSpec(
            width,
            self._homes["token_embd.weight"].tensors["token_embd.weight"].shape[0],
            integer("context_length"),
            float(f"{epsilon:.6g}"),
            rope_from_config({"rope_parameters": self._rope("deci")}),
            "output.weight" not in self._homes,
            tuple(sublayers),
        )

    def _family_spec(self, arch: str) -> tuple[DecoderSpec, Folds]:
        config = self._config(arch)
        return decoder_spec(config), {} if _form(arch).folded else GGUF_FAMILIES[arch].folds(config)

    def _config(self, arch: str) -> dict[str, Any]:
        """The file's metadata as a Hugging Face config."""
        family, form = GGUF_FAMILIES[arch], _form(arch)

        def integer(key: str, default: int | None = None) -> int:
            return int(self._number(f"{arch}.{key}", int, default))

        blocks = integer("block_count")
        check_block_count(blocks, self._homes, f"{self.path}: {arch}.block_count")
        width, num_heads = integer("embedding_length"), self._count(f"{arch}.attention.head_count", blocks)
        if f"{arch}.attention.key_length" not in self._metadata and width % num_heads:
            raise InputError(f"{self.path}: attention.head_count: expected a divisor of {width}, got {num_heads}")
        head_dim = integer("attention.key_length", width // num_heads)
        rotated = integer("rope.dimension_count", head_dim)
        if rotated != head_dim and not family.partial_rotary:
            raise InputError(f"{self.path}: rope.dimension_count: expected head_dim {head_dim}, got {rotated}")
        epsilon = self._number(f"{arch}.attention.layer_norm_rms_epsilon", float)
        config = {
            "model_type": family.model_type,
            "hidden_size": width,
            "intermediate_size": self._count(f"{arch}.feed_forward_length", blocks),
            "num_hidden_layers": blocks,
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._count(f"{arch}.attention.head_count_kv", blocks, num_heads),
            "head_dim": head_dim,
            "vocab_size": self._homes["token_embd.weight"].tensors["token_embd.weight"].shape[0],
            "max_position_embeddings": integer("context_length"),
            # stored as float32; its shortest decimal is the value the model was trained with
            "rms_norm_eps": float(f"{epsilon:.6g}"),
            "tie_word_embeddings": "output.weight" not in self._homes,
            "attention_bias": "blk.0.attn_q.bias" in self._homes,
            "rope_parameters": {**self._rope(arch), "partial_rotary_factor": rotated / head_dim},
        }
        return config | dict(form.config(lambda key: self._scalar(f"{arch}.{key}"), config))

    def _rope(self, arch: str) -> dict[str, Any]:
        theta = float(self._number(f"{arch}.rope.freq_base", float, 10000.0))
        if _SHORT_FACTORS in self._homes:
            return self._longrope(arch, theta)
        kind = self._metadata.get(f"{arch}.rope.scaling.type", "linear")  # as in llama.cpp
        if kind not in ("none", "linear"):
            raise InputError(
                f"{self.path}: {arch}.rope.scaling.type: expected 'none' or 'linear', got {printable(repr(kind))}"
            )
        if self._metadata.get(f"{arch}.rope.scaling.attn_factor", 1.0) != 1.0:
            raise InputError(f"{self.path}: {arch}.rope.scaling.attn_factor: values other than 1.0 are not supported")
        named = (f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear")  # the second in older files
        key = next((key for key in named if key in self._metadata), None)
        factor = 1.0 if key is None or kind == "none" else float(self._number(key, float))
        if _ROPE_FACTORS in self._homes:
            factors = (self._read(_ROPE_FACTORS).double().flatten() * factor).tolist()
            return {"rope_theta": theta, "rope_type": "factors", "factors": factors}
        if factor == 1.0:
            return {"rope_theta": theta, "rope_type": "default"}
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}

    def _longrope(self, arch: str, theta: float) -> dict[str, Any]:
        return {
            "rope_theta": theta,
            "rope_type": "longrope",
            "short_factor": self._read(_SHORT_FACTORS).double().flatten().tolist(),
            "attention_factor": float(self._number(f"{arch}.rope.scaling.attn_factor", float, 1.0)),
            "original_max_position_embeddings": self._number(f"{arch}.rope.scaling.original_context_length", int),
        }

    def _pieces(self, source: str) -> Iterator[Any]:
        """Tensor `source`, dequantised and flat, as arrays that stay in the cache."""
        from gguf.quants import dequantize

        self.check_unchanged()
        header = self._homes[source]
        tensor = header.tensors[source]
        if tensor.kind in _PLAIN:
            values = header.raw(source).view("<f4" if tensor.kind == GGMLQuantizationType.F32 else "<f2")
            for first in range(0, values.size, _PIECE):
                yield values[first : first + _PIECE].copy()  # of a mapped file, which torch takes for writable
            return
        elements, nbytes = GGML_QUANT_SIZES[tensor.kind]
        step = _PIECE // elements * nbytes
        data = header.raw(source)
        for first in range(0, tensor.nbytes, step):
            try:
                values = dequantize(data[first : first + step][None], tensor.kind)
            except (NotImplementedError, ValueError) as error:
                raise InputError(f"{self.path}: {source}: cannot dequantise {tensor.kind.name}: {error}") from error
            yield values.reshape(-1)

    def _read(self, source: str) -> Tensor:
        whole = np.concatenate(list(self._pieces(source)))
        return torch.from_numpy(whole.reshape(self._homes[source].tensors[source].shape))

    def _part(self, source: str) -> Tensor:
        shape = self._homes[source].tensors[source].shape
        flat = torch.empty(torch.Size(shape).numel(), dtype=self.dtype)
        first = 0
        for piece in self._pieces(source):
            self._check_range(source, float(piece.min()), float(piece.max()))
            flat[first : first + piece.size] = torch.from_numpy(piece)
            first += piece.size
        values = flat.view(shape)
        if self._interleaved and (".attn_q." in source or ".attn_k." in source):
            return _half_split(values, self.spec.attention_sublayers()[0].head_dim)
        return values

    @functools.cached_property
    def _assets(self) -> Mapping[str, bytes]:
        return gguf_assets(self.path, self._metadata, self.spec.vocab_size)

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._assets


def _half_split(values: Tensor, head_dim: int) -> Tensor:  # [heads * D, ...]
    """Rows of each head from interleaved pairs (0, D/2, 1, D/2 + 1, ...) to halves (0, 1, ..)."""
    pairs = values.view(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
