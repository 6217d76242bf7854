"""Merging neighbouring sub-layers side by side, and keeping some of their units. FlattenGPT, arXiv 2602.08858.

    x + sum_m f_m(rms(x) * g_m)  =  x + f(rms(x))

with the gains g_m folded into the projections and the heads (or channels) of all m concatenated. The
merged norm has gain 1. A unit is a KV group of attention (a KV head with its query heads, contiguous) or
a channel of the FFN (a row of gate and up, a column of down). q/k-norm gains cannot be folded and stay
with their heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import AttentionSpec, FFNSpec, SublayerSpec


def check_mergeable(sublayer: SublayerSpec) -> None:
    """Refuse a sub-layer that no other can merge with. Raises InputError."""
    why = None
    if sublayer.post_norm or not sublayer.pre_norm:
        why = "ends in a norm, and a sum of normed outputs is not the norm of a sum"
    elif isinstance(sublayer, AttentionSpec) and sublayer.qk_norm_over == "all":
        why = "norms its queries and keys over all heads at once"
    if why is not None:
        raise InputError(f"flatten: the {sublayer.kind} of block {sublayer.origin[0]} cannot merge: it {why}")


def merged_spec(sources: Sequence[SublayerSpec]) -> SublayerSpec:
    """Spec of `sources` side by side, at full width. Raises InputError where they do not fit together."""
    first = sources[0]
    origin = tuple(sorted({b for s in sources for b in s.origin}))
    if len(sources) == 1:
        return first
    for sublayer in sources:
        check_mergeable(sublayer)
    if isinstance(first, FFNSpec):
        widths = [s.intermediate_size for s in sources if isinstance(s, FFNSpec)]
        if len(widths) != len(sources):
            raise InputError("flatten: an FFN and an attention cannot merge")
        if len({s.activation for s in sources if isinstance(s, FFNSpec)}) > 1:
            raise InputError(f"flatten: blocks {list(origin)} cannot merge, their activation differ")
        bias = any(s.down_bias for s in sources if isinstance(s, FFNSpec))
        return dataclasses.replace(first, intermediate_size=sum(widths), origin=origin, down_bias=bias)
    attentions = [s for s in sources if isinstance(s, AttentionSpec)]
    if len(attentions) != len(sources):
        raise InputError("flatten: an FFN and an attention cannot merge")
    same = ("head_dim", "sliding_window", "qkv_bias", "o_bias", "qk_norm", "use_rope", "rope", "scale", "softcap")
    for name in same:
        values = [getattr(s, name) for s in attentions]
        if len(set(values)) > 1:
            raise InputError(f"flatten: blocks {list(origin)} cannot merge, their {name} differ: {values}")
    if len({s.num_heads // s.num_kv_heads for s in attentions}) > 1:
        raise InputError(f"flatten: blocks {list(origin)} cannot merge, their query heads per KV head differ")
    return dataclasses.replace(
        first,
        num_heads=sum(s.num_heads for s in attentions),
        num_kv_heads=sum(s.num_kv_heads for s in attentions),
        origin=origin,
    )


def narrowed_spec(merged: SublayerSpec, units: int) -> SublayerSpec:
    """`merged` with only `units` KV groups or channels."""
    if isinstance(merged, FFNSpec):
        return dataclasses.replace(merged, intermediate_size=units)
    if merged.qk_norm and merged.qk_norm_over == "all":
        raise InputError(f"narrow: the attention of block {merged.origin[0]} norms all its heads at once; none can go")
    per_group = merged.num_heads // merged.num_kv_heads
    return dataclasses.replace(merged, num_heads=units * per_group, num_kv_heads=units)


def unit_columns(spec: SublayerSpec, keep: Sequence[int]) -> Tensor:  # [k * width] int64
    """Columns of the output projection that belong to the units `keep` of a sub-layer with `spec`."""
    kept = torch.tensor(list(keep), dtype=torch.int64)
    if isinstance(spec, FFNSpec):
        return kept
    width = spec.num_heads // spec.num_kv_heads * spec.head_dim
    return (kept[:, None] * width + torch.arange(width)).flatten()


def _fold(weight: Tensor, gain: Tensor | None) -> Tensor:  # [O, C], [C] -> [O, C]
    """Gain of the norm before a projection, folded into it in float64."""
    return weight if gain is None else weight.double() * gain.double()


def _split_qkv(spec: AttentionSpec, packed: Tensor) -> list[Tensor]:  # [(H + 2K) D, ...] -> q, k, v
    return list(packed.split([spec.q_size, spec.kv_size, spec.kv_size]))


def _select(rows: Tensor, keep: Sequence[int] | None, units: int) -> Tensor:  # [units * width, ...]
    """Rows of the units `keep`, of `units` equal ones."""
    if keep is None:
        return rows
    by_unit = rows.reshape(units, rows.shape[0] // units, *rows.shape[1:])
    return by_unit[torch.tensor(list(keep))].flatten(0, 1)


def merged_tensor(parent: Checkpoint, sources: Sequence[int], keep: Sequence[int] | None, short: str) -> Tensor:
    """Tensor `short` (such as `qkv_proj.weight`) of the parent's sub-layers `sources` merged, units `keep` of it."""
    specs = [parent.spec.sublayers[i] for i in sources]

    def read(index: int, name: str) -> Tensor:
        return parent.tensor(f"sublayers.{index}.{name}")

    def gain(index: int) -> Tensor | None:
        return read(index, "norm.weight") if len(sources) > 1 else None

    if short == "post_norm.weight":
        return read(sources[0], short)
    if short == "norm.weight":
        own = read(sources[0], short)
        return own if len(sources) == 1 else torch.ones_like(own)
    if short in ("o_proj.bias", "down_proj.bias"):
        biased = [i for i, s in zip(sources, specs, strict=True) if isinstance(s, AttentionSpec) or s.down_bias]
        return torch.stack([read(i, short).double() for i in biased]).sum(0)
    if isinstance(specs[0], FFNSpec):
        return _ffn_tensor(specs, sources, keep, short, read, gain)
    return _attention_tensor(specs, sources, keep, short, read, gain)


_Read = Callable[[int, str], Tensor]
_Gain = Callable[[int], Tensor | None]


def _ffn_tensor(
    specs: Sequence[SublayerSpec],
    sources: Sequence[int],
    keep: Sequence[int] | None,
    short: str,
    read: _Read,
    gain: _Gain,
) -> Tensor:
    channels = sum(s.intermediate_size for s in specs if isinstance(s, FFNSpec))
    if short == "down_proj.weight":
        columns = torch.cat([read(i, short) for i in sources], dim=1)
        return _select(columns.T, keep, channels).T.contiguous()
    halves = [_fold(read(i, short), gain(i)).chunk(2) for i in sources]
    return torch.cat([_select(torch.cat([h[part] for h in halves]), keep, channels) for part in (0, 1)])


def _attention_tensor(
    specs: Sequence[SublayerSpec],
    sources: Sequence[int],
    keep: Sequence[int] | None,
    short: str,
    read: _Read,
    gain: _Gain,
) -> Tensor:
    attentions = [s for s in specs if isinstance(s, AttentionSpec)]
    groups = sum(s.num_kv_heads for s in attentions)
    if short == "o_proj.weight":
        columns = torch.cat([read(i, short) for i in sources], dim=1)
        return _select(columns.T, keep, groups).T.contiguous()
    if short in ("q_norm.weight", "k_norm.weight"):
        return _select(torch.cat([read(i, short) for i in sources]), keep, groups)
    fold = short == "qkv_proj.weight"  # a bias is added after the gain
    parts = [
        _split_qkv(s, _fold(read(i, short), gain(i) if fold else None))
        for s, i in zip(attentions, sources, strict=True)
    ]
    return torch.cat([_select(torch.cat([p[part] for p in parts]), keep, groups) for part in (0, 1, 2)])
