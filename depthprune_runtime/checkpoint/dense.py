"""What dense sources share: packed tensors made of the source's own, and nothing in the source misread.

A source is compared with the spec of its config before anything is read: names, shapes and dtypes. What it holds
beyond that is refused where it belongs to a layer that is run, and named in a warning otherwise.
"""

from __future__ import annotations

import abc
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from depthprune_runtime.checkpoint.base import Checkpoint
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families import Fold, Folds, Names, source_key, source_shapes
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, Shape

_log = logging.getLogger("depthprune_runtime")
# computed anew from the config, or masks of older code; no result depends on them
_HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|attn\.rope\.freqs$|attn\.masked_bias$|self_attn\.bias$"
    r"|attn_rot_embd\.weight$"
)
_BLOCK = re.compile(r"(?:(?:model|backbone|rwkv)\.)?(?:layers|blocks|blk)\.([0-9]{1,9})\.")
_NAMED = 3  # names in a message


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a source: its dtype as the format calls it, and its shape."""

    dtype: str
    shape: Shape


def check_block_count(claimed: object, names: Iterable[str], what: str) -> None:
    """Refuse a config that claims more blocks than the files hold, before anything is built for them.

    what: the config's key, for the message.
    """
    if not isinstance(claimed, int) or isinstance(claimed, bool) or claimed < 1:
        raise InputError(f"{what}: expected a positive integer, got {printable(repr(claimed))}")
    held = {int(match[1]): match[0] for name in names if (match := _BLOCK.match(name))}
    missing = next((i for i in range(claimed) if i not in held), None)  # at most one step more than blocks
    if missing is not None:
        like = next(iter(held.values()), "layers.0.")
        block = re.sub(r"[0-9]+\.$", f"{missing}.", like)
        raise InputError(
            f"{what}: expected at most {len(held)}, the blocks in the files, got {claimed}: {block}* is missing"
        )


def _few(names: list[str]) -> str:
    shown = ", ".join(printable(name, 80) for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def check_tensors(
    where: object,
    parts: Mapping[str, Mapping[str, Shape]],
    stored: Mapping[str, StoredTensor],
    dtypes: Iterable[str],
    unused: Iterable[str] = (),
) -> None:
    """Compare what a source holds with what will be read.

    where: the source, for messages; parts: packed name -> source name -> shape; stored: source name -> tensor; dtypes:
    those that stand for the weights themselves; unused: names known to change nothing. Raises InputError for a tensor
    that is missing, of another shape or dtype, and for one that belongs to a layer of `parts` but is not among them.
    """
    allowed, read, blocks = set(dtypes), set(), set()
    for shapes in parts.values():
        for name, shape in shapes.items():
            found = stored.get(name)
            if found is None:
                raise InputError(f"{where}: tensor {name} is missing")
            if found.dtype not in allowed:
                raise InputError(
                    f"{where}: {name}: expected weights in {', '.join(sorted(allowed))}, got {printable(found.dtype)}; "
                    "give the model in bf16, fp16 or fp32, before it was quantised"
                )
            if found.shape != shape:
                raise InputError(f"{where}: {name}: expected shape {list(shape)}, got {list(found.shape)}")
            read.add(name)
            if match := _BLOCK.match(name):
                blocks.add(match[0].rstrip("."))
    owners = blocks | {name.rpartition(".")[0] for name in read}
    left = sorted(set(stored) - read - set(unused))
    left = [name for name in left if not _HARMLESS.search(name)]
    if changing := [name for name in left if name in owners or not owners.isdisjoint(_ancestors(name))]:
        raise InputError(
            f"{where}: {len(changing)} tensors belong to layers of this model, but nothing here applies them (biases, "
            f"scales, adapters or norms that are not supported): {_few(changing)}"
        )
    if left:
        _log.warning("%s: %d tensors are not used: %s", where, len(left), _few(left))


class DenseCheckpoint(Checkpoint):
    """A checkpoint whose packed tensors are concatenated from those of a source in another format."""

    where: object  # file or folder, for messages
    _folds: Folds = MappingProxyType({})

    def _set_parts(self, table: Names, spec: DecoderSpec, folds: Folds | None = None) -> None:
        self.spec = spec
        self._shapes = spec.tensor_shapes()
        self._parts = source_shapes(table, spec)
        if folds is not None:
            self._folds = folds

    @abc.abstractmethod
    def _read(self, source: str) -> Tensor:
        """Tensor `source` of the files, as it is stored or dequantised."""

    def _check_range(self, source: str, low: float, high: float) -> None:
        """Refuse values of tensor `source` that are not finite in `dtype`; low, high: their range, NaN if one is."""
        ends = torch.tensor([low, high], dtype=torch.float64)
        if ends.to(self.dtype).isfinite().all():
            return
        if ends.isfinite().all():
            dtype = str(self.dtype).removeprefix("torch.")
            raise InputError(f"{self.where}: {source}: its values overflow {dtype}; use bfloat16 or float32")
        raise InputError(f"{self.where}: {source}: expected finite weights, got infinite values or NaN")

    def _part(self, source: str) -> Tensor:
        """Tensor `source` in `dtype`, all values finite."""
        values = self._read(source)
        low, high = torch.aminmax(values)  # many times faster than isfinite
        self._check_range(source, float(low), float(high))
        return values.to(self.dtype)

    def _folded(self, source: str, fold: Fold) -> Tensor:
        """Tensor `source` with `fold` in it, rounded to `dtype` once."""
        values = (self._read(source).double() + fold.shift) * fold.factor
        low, high = torch.aminmax(values)
        self._check_range(source, float(low), float(high))
        return values.to(self.dtype)

    def tensor(self, name: str) -> Tensor:
        fold = self._folds.get(source_key(self.spec, name))
        sources = self._parts[name]
        parts = [self._part(source) if fold is None else self._folded(source, fold) for source in sources]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        shape = self._shapes[name]
        if packed.numel() == torch.Size(shape).numel():
            packed = packed.reshape(shape)
        # else a norm of heads has one gain for all in the source
        return _rotated_first(self.spec, name, packed.expand(shape)).contiguous()


def _rotated_first(spec: DecoderSpec, name: str, packed: Tensor) -> Tensor:
    """`packed` with the rotated pairs of every query and key head first, see `RopeSpec.rotary_dim`.

    A source rotates the first rotary_dim channels of a head, in halves; scores do not see the order of channels.
    """
    if not name.startswith("sublayers."):
        return packed
    _, index, short = name.split(".", 2)
    sublayer = spec.sublayers[int(index)]
    if not isinstance(sublayer, AttentionSpec) or short.partition(".")[0] not in ("qkv_proj", "q_norm", "k_norm"):
        return packed
    dim, rotated = sublayer.head_dim, (sublayer.rope or spec.rope).rotary_dim
    if rotated is None or rotated == dim:
        return packed
    first, second = torch.arange(rotated).chunk(2)
    rest_first, rest_second = torch.arange(rotated, dim).chunk(2)
    order = torch.cat((first, rest_first, second, rest_second))
    if short in ("q_norm.weight", "k_norm.weight"):
        return packed[:, order]
    heads = packed.view(-1, dim, *packed.shape[1:])
    values = heads[sublayer.num_heads + sublayer.num_kv_heads :]
    return torch.cat((heads[: -sublayer.num_kv_heads][:, order], values)).view(packed.shape)
