"""What our own file says of itself, its JSON description: one schema, checked before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from depthprune_runtime.checkpoint import stored
from depthprune_runtime.checkpoint.container import DTYPES
from depthprune_runtime.checkpoint.shards import MAX_SHARDS
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.fields import from_fields
from depthprune_runtime.plan import Drop, Flatten, PrunePlan
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.weights.quantized import QuantSpec

FORMAT_VERSION = 1
_TENSOR_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_HEADER_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_INCOMPLETE = ("deci", "nemotron-nas", "depthprune")  # families whose blocks may lack a half
_SHARD_NAME = re.compile(r"[^/\0]{1,211}-\d{5}-of-\d{5}-[0-9a-f]{16}\.safetensors", re.ASCII)  # and no other folder


@dataclass(frozen=True)
class Provenance:
    """Where weights come from. blocks: of the dense model; plans: those of earlier prunings, the first one first, each
    in the numbering of what the one before left. Other keys are kept and mean nothing here."""

    source: str | None = None
    format: str | None = None
    family: str | None = None
    blocks: int | None = None
    dequantized_from: tuple[str, ...] = ()
    quantization: dict[str, Any] | None = None
    plans: tuple[dict[str, Any], ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        known = {f.name for f in fields(cls)}
        return from_fields(cls, {k: v for k, v in data.items() if k in known}, "provenance")


@dataclass(frozen=True)
class _Stored:
    """The JSON, key by key."""

    format_version: int
    dtype: str
    spec: dict[str, Any]
    plan: dict[str, Any] | None
    provenance: dict[str, Any]
    checksums: dict[str, str]
    quantization: dict[str, Any] = field(default_factory=dict)  # left out where nothing is quantised
    shards: dict[str, str] = field(default_factory=dict)  # of a head: shard -> checksum of its header
    weight_map: dict[str, str] = field(default_factory=dict)  # of a head: tensor -> shard


@dataclass(frozen=True)
class Description:
    """A checked description. plan and provenance: as they are stored, for whom they concern."""

    dtype: str
    spec: DecoderSpec
    quantization: Mapping[str, QuantSpec]
    plan: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    checksums: Mapping[str, str]
    shards: Mapping[str, str]
    weight_map: Mapping[str, str]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Description:
        """Raises InputError in one line for anything that `write_native` does not write."""
        version = data.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise InputError(
                f"expected format version {FORMAT_VERSION}, got {printable(repr(version))}; use the matching release"
            )
        found = from_fields(_Stored, dict(data), "description")
        dtype = DTYPES.get(found.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise InputError(f"description.dtype: expected F32, F16 or BF16, got {printable(repr(found.dtype))}")
        spec = DecoderSpec.from_json(found.spec)
        plan = None if found.plan is None else PrunePlan.from_json(found.plan)
        check_depth(spec, plan, Provenance.from_json(found.provenance))
        _check_index(found)
        return cls(
            found.dtype,
            spec,
            stored.quantization_from_json(found.quantization, spec),
            found.plan,
            found.provenance,
            found.checksums,
            found.shards,
            found.weight_map,
        )


def check_depth(spec: DecoderSpec, plan: PrunePlan | None, provenance: Provenance) -> None:
    """The dense model has no more blocks than spec and plan tell of, and no sub-layer comes from beyond them.

    Raises InputError.
    """
    last = max((block for sub in spec.sublayers for block in sub.origin), default=-1)
    blocks = last + 1 if provenance.blocks is None else provenance.blocks
    earlier = [PrunePlan.from_json(data) for data in provenance.plans]
    edits = [edit for made in (*earlier, *([] if plan is None else [plan])) for edit in made.edits]
    dropped = sum(isinstance(edit, Drop) for edit in edits)
    if earlier:  # a later plan may drop what an earlier one merged, all of it at once
        dropped += sum(2 * len(edit.blocks) for edit in edits if isinstance(edit, Flatten))
    known = sum(len(sub.origin) for sub in spec.sublayers) + dropped
    if not last < blocks:
        raise InputError(f"spec: a sub-layer comes from block {last}, but the dense model has {blocks} blocks")
    least = blocks if provenance.family in _INCOMPLETE else 2 * blocks
    if least > known:
        raise InputError(f"provenance.blocks: {blocks} blocks, but spec and plan tell of {known} sub-layers only")


def _check_index(found: _Stored) -> None:
    for name, value in found.checksums.items():
        if not _TENSOR_CHECKSUM.fullmatch(value):
            raise InputError(f"checksums: expected 16 hex digits for {printable(name)}, got {printable(repr(value))}")
    if len(found.shards) > MAX_SHARDS:
        raise InputError(f"shards: expected at most {MAX_SHARDS}, got {len(found.shards)}")
    for name, value in found.shards.items():
        if not _SHARD_NAME.fullmatch(name):
            raise InputError(f"shards: expected the name of a shard beside this file, got {printable(repr(name))}")
        if not _HEADER_CHECKSUM.fullmatch(value):
            raise InputError(f"shards: expected 32 hex digits for {printable(name)}, got {printable(repr(value))}")
    for tensor, shard in found.weight_map.items():
        if shard not in found.shards or tensor not in found.checksums:
            raise InputError(
                f"weight_map: {printable(tensor)} in {printable(shard)}: expected a tensor and a shard that are listed"
            )
