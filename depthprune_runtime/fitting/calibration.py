"""Calibration: token windows, and hidden states streamed through the dense model sub-layer by sub-layer.

Only one sub-layer's weights are in memory at a time, so models larger than memory can be scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting import states
from depthprune_runtime.fitting.finite import FiniteStates
from depthprune_runtime.fitting.states import TokenStates
from depthprune_runtime.fitting.stream import Stream, embed
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.options import check_count

_BATCH_TOKENS = 4096  # tokens per forward pass, at most
_RING = 3  # buffers: entering a block, between its sub-layers, leaving it


@dataclass(frozen=True)
class CalibrationSet:
    """Windows of token ids and where they came from (for the plan's settings)."""

    windows: Tensor  # [N, S] int64
    description: dict[str, Any]


NO_WINDOWS = CalibrationSet(torch.empty(0, 0, dtype=torch.int64), {})  # of whoever decides without a text


def sample_windows(ids: Sequence[int], samples: int, seq_len: int, seed: int | None) -> Tensor:  # [N, S] int64
    """`samples` different windows of the non-overlapping ones of `seq_len` tokens, in text order.

    seed: of their draw; None: the first ones.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63):
        raise InputError(f"seed: expected an integer from 0 to below 2**63, got {seed!r}")
    for name, value in (("samples", samples), ("seq_len", seq_len)):
        check_count(name, value)
    available = len(ids) // seq_len
    if available < samples:
        raise InputError(
            f"calibration text is too short: {samples} windows of {seq_len} tokens need {samples * seq_len:,} tokens, "
            f"got {len(ids):,}; give more text, fewer samples or shorter windows"
        )
    if seed is None:
        order = torch.arange(samples)
    else:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return torch.tensor(ids[: available * seq_len], dtype=torch.int64).view(available, seq_len)[order]


def calibration_set(
    name: str, text: str, encode: Callable[[str], list[int]], samples: int, seq_len: int, seed: int | None
) -> CalibrationSet:
    """Tokenise `text` once and take the windows, see `sample_windows`."""
    windows = sample_windows(encode(text), samples, seq_len, seed)
    description = {
        "text": name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
    }
    return CalibrationSet(windows, description)


def stream_hidden_states(
    checkpoint: Checkpoint,
    windows: Tensor,  # [N, S] int64
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (sub-layer, hidden states entering it, hidden states leaving it), both [n, S, C], batch by batch.

    Sub-layers come in order; all batches of one come before the next. The residual stream, N * S * C elements,
    is kept three times over on `device` (on disk above a limit): what is yielded is a view, and what entered a
    sub-layer stays valid until the next one is through.
    """
    count, seq_len = windows.shape
    spec = checkpoint.spec
    if seq_len > spec.max_position_embeddings:
        raise InputError(
            f"seq_len: expected at most the model's context of {spec.max_position_embeddings}, got {seq_len}"
        )
    loader = SublayerLoader(spec, checkpoint.tensor, device, dtype)
    limit = states.MEMORY_LIMIT // _RING
    at_once = states.batch_tokens(spec, _BATCH_TOKENS)
    shape = (count, seq_len, spec.hidden_size)
    ring = [TokenStates.empty(*shape, device, at_once, dtype, limit) for _ in range(_RING)]
    embed(loader, windows, ring[0])
    stream = Stream(seq_len, device, FiniteStates(loader, checkpoint.name))
    for i in range(len(spec.sublayers)):
        entering, leaving = ring[i % _RING], ring[(i + 1) % _RING]
        for b, _ in enumerate(stream.outputs(i, loader.sublayer(i), entering, leaving)):
            yield i, entering.windows(b), leaving.windows(b)
