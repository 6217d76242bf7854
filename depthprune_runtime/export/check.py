"""What was written, read back and run beside the model that it was made of, sub-layer by sub-layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.model.sublayers import normalised

_TOKENS = 48
_ROWS = 4096  # of the head at a time
_TOLERANCE = 1e-4  # relative, in float32; a swapped or lost tensor is above 1e-1
_CPU = torch.device("cpu")

Convert = Callable[[Tensor], Tensor]


def _logits(checkpoint: Checkpoint, ids: Tensor, convert: Convert, on_sublayer: Callable[[], None]) -> Tensor:
    """[T, V] float32; one sub-layer is in memory at a time. convert: weights as they were written."""
    spec = checkpoint.spec
    loader = SublayerLoader(spec, lambda name: convert(checkpoint.tensor(name)), _CPU, torch.float32)
    batch = packed([ids.shape[0]], _CPU)
    residual = convert(checkpoint.tensor("embed_tokens.weight")[ids]).float()
    for index in range(len(spec.sublayers)):
        residual = residual + loader.sublayer(index)(residual, batch)
        on_sublayer()
    hidden = normalised(residual, loader.tensor("norm.weight"), spec.rms_norm_eps)
    head = checkpoint.tensor(spec.head_name)
    strips = [hidden @ convert(head[first : first + _ROWS]).float().T for first in range(0, spec.vocab_size, _ROWS)]
    return torch.cat(strips, dim=1)


def check_logits(
    source: Checkpoint, written: Checkpoint, name: str, convert: Convert, on_sublayer: Callable[[], None]
) -> float:
    """Relative L2 distance of the logits of `written` from those of `source`, over a fixed text of random ids.

    name: of what was written, for the message; convert: what writing did to a weight. Raises InputError where the
    logits are not those of the same model.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, source.spec.max_position_embeddings)
    ids = torch.randint(source.spec.vocab_size, (length,), generator=generator)
    with torch.inference_mode():
        wanted = _logits(source, ids, convert, on_sublayer)
        found = _logits(written, ids, lambda tensor: tensor, on_sublayer)
    distance = float((found - wanted).norm() / wanted.norm())
    if not distance <= _TOLERANCE:
        raise InputError(
            f"{name}: its logits are {distance:.3g} (relative L2) from those of {source.name}, expected at "
            f"most {_TOLERANCE:g}: nothing is kept of it; please report this model's shape"
        )
    return distance
