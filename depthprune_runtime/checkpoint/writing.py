"""Write a checkpoint with a bar, and import a dense model as one file of our own."""

from __future__ import annotations

from pathlib import Path

import torch

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint, write_native
from depthprune_runtime.checkpoint.outputs import as_path, check_output
from depthprune_runtime.checkpoint.shards import DEFAULT_MAX_SHARD_SIZE, parse_size
from depthprune_runtime.errors import InputError
from depthprune_runtime.host.devices import resolve_dtype
from depthprune_runtime.paths import source_path
from depthprune_runtime.progress import Progress
from depthprune_runtime.spec import DecoderSpec


def write(
    checkpoint: Checkpoint, output: Path, progress: Progress, max_shard_size: int | str, overwrite: bool = False
) -> None:
    """Write `checkpoint` with a bar; see `write_native`."""
    total = sum(map(len, checkpoint.entries().values())) + len(checkpoint.assets)
    with progress.stage(f"write {output.name}", total) as advance:
        write_native(output, checkpoint, lambda _: advance(), max_shard_size, overwrite)


def import_model(
    model: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DecoderSpec:
    """Write `model` as one self-contained file of our own, unchanged but for an adapter that is merged into it.

    Args:
        model: a Hugging Face folder or hub id, a GGUF file, or our file.
        output: the file to write.
        adapter: folder of a LoRA adapter as PEFT saves it, which is merged into a Hugging Face `model`.
        dtype: of the output; by default the source's.
        max_shard_size: as in `prune`.
        overwrite: as in `prune`.
        progress: bars on stderr; by default none.

    Returns:
        The model's spec.

    Raises:
        InputError: where the source or the output will not do.
    """
    from depthprune_runtime.checkpoint.adapters import Adapter
    from depthprune_runtime.checkpoint.huggingface import HuggingFaceCheckpoint

    path = as_path(output, "output")
    max_shard_size = parse_size(max_shard_size)
    checkpoint = open_checkpoint(model, resolve_dtype(dtype))
    if adapter is not None:
        if not isinstance(checkpoint, HuggingFaceCheckpoint):
            raise InputError(f"adapter: expected a Hugging Face folder to merge it into, got {checkpoint.name}")
        checkpoint.adapt(Adapter(source_path(adapter, "adapter")))
    check_output(path, checkpoint.source_files, overwrite)
    write(checkpoint, path, progress or Progress(), max_shard_size, overwrite)
    return checkpoint.spec
