"""Checkpoints: Hugging Face, GGUF and our own file <-> (`DecoderSpec`, tensors), streamed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from depthprune_runtime.checkpoint.base import Checkpoint
from depthprune_runtime.checkpoint.native import NativeCheckpoint, write_native
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.paths import source_path

__all__ = ["Checkpoint", "NativeCheckpoint", "open_checkpoint", "write_native"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _folder(path: Path, dtype: torch.dtype | None, name: str | None) -> Checkpoint:
    """A Hugging Face folder, by the `model_type` of its config."""
    from depthprune_runtime.checkpoint.anchored import AnchoredCheckpoint
    from depthprune_runtime.checkpoint.anchored_layout import MODEL_TYPE
    from depthprune_runtime.checkpoint.deci import DeciCheckpoint
    from depthprune_runtime.checkpoint.gate import read_object
    from depthprune_runtime.checkpoint.huggingface import HuggingFaceCheckpoint
    from depthprune_runtime.checkpoint.paired_layout import MODEL_TYPE as DECI

    config = path / "config.json"
    kind = read_object(config).get("model_type") if config.is_file() else None
    if kind == MODEL_TYPE:
        return AnchoredCheckpoint(path, dtype, name)
    if kind == DECI:
        return DeciCheckpoint(path, dtype, name)
    return HuggingFaceCheckpoint(path, dtype, name)


def open_checkpoint(model: str | Path, dtype: torch.dtype | None = None, verify: bool = True) -> Checkpoint:
    """Open a model: our own file, a Hugging Face folder or hub id, also one that was exported, or a GGUF file.

    dtype: convert a Hugging Face or GGUF source on the way in (our own file keeps its dtype); verify:
    check our own file against its checksums. Raises InputError in one line.
    """
    path = source_path(model, "model")
    try:
        if path.is_dir():
            return _folder(path, dtype, None)
        if path.is_file():
            from depthprune_runtime.checkpoint.gguf import GGUFCheckpoint, is_gguf

            if is_gguf(path):
                return GGUFCheckpoint(path, dtype)
            return NativeCheckpoint(path, verify)
    except PermissionError as error:
        raise InputError(f"{model}: cannot be read: {error.strerror}") from error
    if path.suffix not in (".safetensors", ".gguf") and _HUB_ID.fullmatch(str(model)):
        from depthprune_runtime.checkpoint.huggingface import download

        return _folder(download(str(model)), dtype, str(model))
    raise InputError(f"{printable(model, 1000)}: no such file or folder")
