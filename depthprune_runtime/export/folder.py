"""A Hugging Face folder, written under another name and renamed when it is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.base import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from depthprune_runtime.checkpoint.container import write_entries
from depthprune_runtime.checkpoint.gate import parse_object
from depthprune_runtime.checkpoint.shards import split
from depthprune_runtime.errors import InputError
from depthprune_runtime.export.parts import Unpacked

_ASSETS = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, GENERATION_CONFIG_FILE)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_CODE = Path(__file__).parent / "folder_code"


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes the name `path` when the body ends well; else nothing is left, and `path` is as it was.

    overwrite: in place of the folder that has the name by then.
    """
    target = path.resolve()  # a rename would replace a link, not the folder it names
    mark = f"{target.name}.{os.getpid()}"
    temporary, old = target.with_name(f".{mark}.tmp"), target.with_name(f".{mark}.old")
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)  # of a killed process with our number
    try:
        temporary.mkdir()
        yield temporary
        if overwrite and target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; free some space or choose another disk" if full else ""
        raise InputError(f"output {path}: cannot be written: {error.strerror or error}{hint}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_weights(folder: Path, tensors: Unpacked, max_shard_size: int) -> None:
    """`model.safetensors`, or shards with their index, streamed."""
    groups = split(tensors.entries, max_shard_size)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        with (folder / name).open("w+b") as file:
            write_entries(file, group, tensors.tensor, lambda _: {"format": "pt"})
            file.flush()
            os.fsync(file.fileno())
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": tensors.nbytes},
            "weight_map": {e.name: name for name, group in zip(names, groups, strict=True) for e in group},
        }
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """Ids of the special tokens, as the generation config has them."""
    stored = checkpoint.assets.get(GENERATION_CONFIG_FILE)
    if stored is None:
        return {}
    found = parse_object(stored, f"{checkpoint.name}: {GENERATION_CONFIG_FILE}")
    return {key: found[key] for key in _SPECIAL_IDS if found.get(key) is not None}


def write_config(folder: Path, checkpoint: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    write_json(folder / "config.json", {**config, "dtype": _DTYPE_NAMES[dtype], **token_ids(checkpoint)})


def write_assets(folder: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer, chat template and generation config, as the checkpoint carries them."""
    for name in _ASSETS:
        if name in checkpoint.assets:
            (folder / name).write_bytes(checkpoint.assets[name])


def write_code(folder: Path, names: Iterable[str]) -> None:
    """Python files that travel with the weights."""
    for name in names:
        shutil.copyfile(_CODE / name, folder / name)
