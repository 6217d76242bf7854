"""Carry out a `PrunePlan`: a pruned view of the parent, computed tensor by tensor when asked.

Nothing is copied until it is written, so models larger than memory can be pruned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.pieces import Piece
from depthprune_runtime.pruning.flattengpt import merging
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, SublayerSpec
from depthprune_runtime.weights.rows import Stored

_STRIP_ROWS_BYTES = 32 * 1024 * 1024  # of a float64 strip of input columns while gains are folded


def layout(parent: DecoderSpec, plan: PrunePlan) -> tuple[Piece, ...]:
    """The student's sub-layers in order, in the parent's numbering."""
    plan.check(parent)
    dropped, narrowed = plan.dropped(), plan.narrowed()
    blocks = parent.whole_blocks() or ()
    merged: dict[int, list[tuple[int, ...]]] = {}  # first sub-layer of a flatten -> attentions, FFNs
    for edit in plan.flattened():
        attentions, ffns = zip(*(blocks[b] for b in edit.blocks), strict=True)
        merged[attentions[0]] = [attentions, ffns]
    gone = dropped | {i for halves in merged.values() for sources in halves for i in sources}
    pieces: list[Piece] = []
    for i in range(len(parent.sublayers)):
        for sources in merged.get(i, () if i in gone else ((i,),)):
            pieces.append(Piece(sources, narrowed.get(sources[0])))
    if not pieces:
        raise InputError("plan: it drops every sub-layer")
    used = {p.sources[0] for p in pieces}
    if unused := sorted(set(narrowed) - used):
        raise InputError(f"plan: sub-layers {unused} are narrowed but do not begin a sub-layer that stays")
    return tuple(pieces)


def piece_spec(parent: DecoderSpec, piece: Piece) -> SublayerSpec:
    """Spec of one student sub-layer. Raises InputError where its sources cannot merge."""
    sources = [parent.sublayers[i] for i in piece.sources]
    merged = merging.merged_spec(sources)
    if piece.keep is None:
        return merged
    available = merged.num_kv_heads if isinstance(merged, AttentionSpec) else merged.intermediate_size
    if piece.keep[-1] >= available:
        raise InputError(f"plan: sub-layer {piece.sources[0]} keeps unit {piece.keep[-1]} of {available}")
    return merging.narrowed_spec(merged, len(piece.keep))


def pruned_spec(parent: DecoderSpec, plan: PrunePlan) -> DecoderSpec:
    """Spec of the model that `plan` leaves of `parent`."""
    return dataclasses.replace(parent, sublayers=tuple(piece_spec(parent, p) for p in layout(parent, plan)))


def _with_earlier_plans(parent: Checkpoint) -> Mapping[str, Any]:
    """The parent's provenance; the plan of a parent that is pruned itself joins the plans before it."""
    if parent.plan is None:
        return parent.provenance
    return {**parent.provenance, "plans": [*parent.provenance.get("plans", ()), dict(parent.plan)]}


class _InputColumns(Checkpoint):
    """`parent` with every tensor cut to `columns` of its last axis, the hidden one."""

    def __init__(self, parent: Checkpoint, columns: slice) -> None:
        self.name, self.spec, self.dtype = parent.name, parent.spec, parent.dtype
        self.provenance, self.plan = parent.provenance, parent.plan
        self.source_files = parent.source_files
        self._parent = parent
        self._columns = columns

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._parent.assets

    def tensor(self, name: str) -> Tensor:
        return self._parent.tensor(name)[..., self._columns]


class PrunedCheckpoint(Checkpoint):
    """What `plan` leaves of `parent`, as a checkpoint of its own. Weights that it leaves alone stay as they are stored;
    those merged, narrowed or solved anew are dense.

    replaced: output projections (and their biases) that a repair solved anew, by student tensor name.
    """

    def __init__(self, parent: Checkpoint, plan: PrunePlan, replaced: Mapping[str, Tensor] | None = None) -> None:
        self.name = f"{parent.name} pruned by {plan.method}"
        self.pieces = layout(parent.spec, plan)
        self.spec = pruned_spec(parent.spec, plan)
        self.dtype = parent.dtype
        self.plan = plan.to_json()
        self.provenance = _with_earlier_plans(parent)
        self.source_files = parent.source_files
        self._parent = parent
        self._replaced = dict(replaced or {})
        sources = ((name, self._source(name)) for name in self.spec.projections())
        quantized = parent.quantization
        self.quantization = {name: quantized[s] for name, s in sources if s is not None and s in quantized}

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._parent.assets

    def stored_checksum(self, entry: str) -> str | None:
        weight, _, part = entry.partition(".weight.")  # a part of a quantised one
        source = self._source(f"{weight}.weight" if part else entry)
        return None if source is None else self._parent.stored_checksum(f"{source}.{part}" if part else source)

    def check_unchanged(self) -> None:
        self._parent.check_unchanged()

    def _source(self, name: str) -> str | None:
        """The parent's tensor that `name` is, unchanged."""
        if name in self._replaced:
            return None
        if not name.startswith("sublayers."):
            return name
        _, index, short = name.split(".", 2)
        piece = self.pieces[int(index)]
        whole = len(piece.sources) == 1 and piece.keep is None
        return f"sublayers.{piece.sources[0]}.{short}" if whole else None

    def weight(self, name: str) -> Stored:
        source = self._source(name)
        return self.tensor(name) if source is None else self._parent.weight(source)

    def tensor(self, name: str) -> Tensor:
        source = self._source(name)
        if source is not None:
            return self._parent.tensor(source)
        if name in self._replaced:
            return self._replaced[name].to(self.dtype)
        _, index, short = name.split(".", 2)
        piece = self.pieces[int(index)]
        if short in ("qkv_proj.weight", "gate_up_proj.weight"):
            return self._input_projection(name, piece, short)
        return merging.merged_tensor(self._parent, piece.sources, piece.keep, short).to(self.dtype)

    def _input_projection(self, name: str, piece: Piece, short: str) -> Tensor:  # [rows, C]
        """A merged input projection, some input columns at a time: gains are folded in float64, which takes much
        room, but each column on its own."""
        wide = sum(self._parent.spec.sublayer_shapes(i)[f"sublayers.{i}.{short}"][0] for i in piece.sources)
        made = torch.empty(self.spec.tensor_shapes()[name], dtype=self.dtype)
        step = max(1, _STRIP_ROWS_BYTES // (8 * wide))
        for first in range(0, made.shape[1], step):
            columns = slice(first, first + step)
            part = merging.merged_tensor(_InputColumns(self._parent, columns), piece.sources, piece.keep, short)
            made[:, columns] = part
        return made
