"""`TokenStates`: hidden states of all calibration tokens, in memory or, above a limit, in an unlinked file.

A mapped file's pages are not anonymous memory: the system can write them back and take them at any time.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from depthprune_runtime.spec import AttentionSpec, DecoderSpec

MEMORY_LIMIT = 512 * 1024 * 1024  # bytes that the buffers of one kind may take together before they go to disk
_MAX_BATCH_TOKENS = 4096  # in one forward pass: large enough for GEMM speed
_BATCH_ELEMENTS = 1 << 26  # of the widest activation of a pass: 128 MiB in bf16


def batch_tokens(spec: DecoderSpec, at_most: int = _MAX_BATCH_TOKENS) -> int:
    """Tokens in one forward pass of a sub-layer, so few that its activations stay small beside its weights."""
    widest = max(
        s.q_size + 2 * s.kv_size if isinstance(s, AttentionSpec) else 2 * s.intermediate_size for s in spec.sublayers
    )
    return max(1, min(at_most, _BATCH_ELEMENTS // widest))


def scratch_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, limit: int | None = None
) -> Tensor:
    """Uninitialised tensor of `shape`; on a CPU and above `limit` bytes (default MEMORY_LIMIT) backed by a file."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes <= (MEMORY_LIMIT if limit is None else limit):
        return torch.empty(shape, dtype=dtype, device=device)
    with tempfile.NamedTemporaryFile(prefix="depthprune-", suffix=".states") as file:
        file.truncate(nbytes)
        # shared, so that the pages belong to the file; the mapping outlives its name
        flat = torch.from_file(str(Path(file.name)), shared=True, size=math.prod(shape), dtype=dtype)
    return flat.view(shape)


class TokenStates:
    """Values of all calibration tokens, handled in batches of whole windows.

    values: [N, S, width], contiguous; batch_tokens: at most so many in a batch, but at least one window.
    """

    def __init__(self, values: Tensor, batch_tokens: int = _MAX_BATCH_TOKENS) -> None:
        self.values = values
        self._per_batch = max(1, batch_tokens // values.shape[1])

    @classmethod
    def empty(
        cls,
        windows: int,
        seq_len: int,
        width: int,
        device: torch.device,
        batch_tokens: int = _MAX_BATCH_TOKENS,
        dtype: torch.dtype = torch.float32,
        limit: int | None = None,
    ) -> TokenStates:
        """Uninitialised values of `windows` windows. limit: bytes above which they go to disk."""
        return cls(scratch_tensor((windows, seq_len, width), dtype, device, limit), batch_tokens)

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(self.values.shape[0] / self._per_batch)

    def windows(self, index: int) -> Tensor:  # [n, S, width], a view
        """Batch `index` window by window."""
        first = index * self._per_batch
        return self.values[first : first + self._per_batch]

    def batch(self, index: int) -> Tensor:  # [n * S, width], a view
        """Batch `index` token by token."""
        return self.windows(index).view(-1, self.values.shape[-1])

    def copy_from(self, other: TokenStates) -> None:
        self.values.copy_(other.values)


class TensorStore:
    """Tensors that must outlive the walk: in memory up to a budget, then each in an unlinked file."""

    def __init__(self, budget: int | None = None) -> None:
        self._left = MEMORY_LIMIT // 2 if budget is None else budget
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        stored = scratch_tensor(tuple(tensor.shape), tensor.dtype, torch.device("cpu"), limit=self._left)
        stored.copy_(tensor)
        self._left = max(0, self._left - stored.nbytes)
        self._tensors[name] = stored

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._tensors
