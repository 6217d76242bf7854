"""How weights lie in a file: one tensor each or, where quantised, a tensor for each part of them.

`sublayers.3.qkv_proj.weight` of 4 bits is stored as `sublayers.3.qkv_proj.weight.codes`, `.scales` and, where
asymmetric, `.zeros`, in the shapes of `QuantSpec.shapes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from depthprune_runtime.checkpoint.container import TensorEntry
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.fields import from_fields
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.weights.quantized import QuantSpec

_PART_DTYPES = {"codes": torch.uint8, "scales": torch.bfloat16, "zeros": torch.uint8}


def part_entries(name: str, quant: QuantSpec, rows: int, columns: int) -> list[TensorEntry]:
    """The tensors that quantised weight `name` of shape [rows, columns] is stored as."""
    shapes = quant.shapes(rows, columns)
    return [TensorEntry(f"{name}.{part}", _PART_DTYPES[part], shape) for part, shape in shapes.items()]


def weight_entries(
    spec: DecoderSpec, dtype: torch.dtype, quantization: Mapping[str, QuantSpec]
) -> dict[str, list[TensorEntry]]:
    """Weight name -> the tensors that it is stored as, in the order in which decoding reads them."""
    entries = {}
    for name, shape in spec.tensor_shapes().items():
        quant = quantization.get(name)
        entries[name] = [TensorEntry(name, dtype, shape)] if quant is None else part_entries(name, quant, *shape)
    return entries


def aligned(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """`entries` of one file with all codes first: they come in whole tiles of 64 bytes, so that each tile then starts
    on a cache line, which behind the scales of an odd number of panels they would not."""
    return sorted(entries, key=lambda entry: not entry.name.endswith(".codes"))


def quantization_to_json(quantization: Mapping[str, QuantSpec], spec: DecoderSpec) -> dict[str, dict[str, object]]:
    """In the order of `spec`, in whichever order the weights were quantised."""
    return {name: dataclasses.asdict(quantization[name]) for name in spec.projections() if name in quantization}


def quantization_from_json(data: object, spec: DecoderSpec) -> dict[str, QuantSpec]:
    """Weight name -> how it is quantised. Raises InputError for names that are no projection of `spec`."""
    if not isinstance(data, dict):
        raise InputError(f"quantization: expected a JSON object, got {type(data).__name__}")
    if unknown := sorted(set(data) - set(spec.projections())):
        raise InputError(f"quantization: expected names of projections, got {printable(unknown[0])}")
    return {name: from_fields(QuantSpec, value, f"quantization.{name}") for name, value in data.items()}
