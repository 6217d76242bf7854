"""Where and how a decoder's weights lie in memory.

On a CPU they are copied once, in the order in which decoding reads them, into huge pages, and bfloat16 projections into
panels where the kernels like those better. `mmap` leaves them in the mapped file instead, shared between processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.host.huge_pages import HugePages, huge_pages_available
from depthprune_runtime.model.decoder import WeightGetter
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.weights.panels import panel_shape, panels_pay
from depthprune_runtime.weights.rows import Stored


def in_panels(spec: DecoderSpec, dtype: torch.dtype) -> frozenset[str]:
    """The dense weights that lie in panels on this machine's CPU: projections, and an embedding that is the head."""
    if dtype != torch.bfloat16 or not panels_pay():
        return frozenset()
    return frozenset(spec.projections())


def decoder_weights(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, mmap: bool, rounds_inputs: bool = True
) -> WeightGetter:
    """What a decoder takes its weights from. rounds_inputs: see `Weight`."""
    stored = _stored(checkpoint, device, dtype, mmap)

    def weight(name: str) -> Stored:
        found = stored(name)
        return found if isinstance(found, Tensor) else found.with_inputs_rounded(rounds_inputs)

    return weight


def _stored(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, mmap: bool) -> WeightGetter:
    if mmap or device.type != "cpu":
        return checkpoint.weight
    packed = in_panels(checkpoint.spec, dtype) - set(checkpoint.quantization)
    if not packed and not huge_pages_available():
        return checkpoint.weight
    sizes = []
    for name, entries in checkpoint.entries().items():
        for entry in entries:
            shape = panel_shape(*entry.shape) if name in packed else entry.shape
            of_file = name in checkpoint.quantization
            sizes.append(entry.nbytes if of_file else torch.Size(shape).numel() * dtype.itemsize)
    pages = HugePages(sum(map(HugePages.room, sizes)))

    def copied(name: str) -> Stored:
        weight = checkpoint.weight(name)
        if not isinstance(weight, Tensor):
            return weight.map(pages.copy)
        weight = weight.to(dtype)
        if name in packed:
            return ops.pack_panels(weight, pages.empty(panel_shape(*weight.shape), dtype))
        return pages.copy(weight)

    return copied
