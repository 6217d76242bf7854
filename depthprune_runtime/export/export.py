"""`export_model`: one model of ours, or of anybody's, in the format of a target."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.checkpoint.container import atomic_files
from depthprune_runtime.checkpoint.outputs import as_path, check_destination, check_folder
from depthprune_runtime.checkpoint.shards import DEFAULT_MAX_SHARD_SIZE, parse_size
from depthprune_runtime.errors import InputError
from depthprune_runtime.export import deci, gguf, huggingface
from depthprune_runtime.export.card import CardFacts, model_card
from depthprune_runtime.export.check import Convert, check_logits
from depthprune_runtime.export.folder import new_folder
from depthprune_runtime.export.names import Target
from depthprune_runtime.export.push import check_repository, push
from depthprune_runtime.export.targets import check_target
from depthprune_runtime.host.devices import resolve_dtype
from depthprune_runtime.progress import Advance, Progress

_FOLDERS = {"hf": huggingface.write, "deci": deci.write}


@dataclass(frozen=True)
class ExportResult:
    """path: what was written; kind: the model type or architecture that it has there; distance: relative L2 between
    its logits, read back, and the model's own, None where that was left out; url: of the repository it was pushed to.
    """

    path: Path
    target: Target
    kind: str
    distance: float | None
    url: str | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def _check_dense(checkpoint: Checkpoint, dequantize: bool) -> None:
    if checkpoint.quantization and not dequantize:
        raise InputError(
            f"{checkpoint.name}: {len(checkpoint.quantization)} of its weights are quantised, and targets take dense "
            "ones; give --dequantize (dequantize=True), or export the model that it was made from"
        )


def _as_written(target: Target, dtype: torch.dtype) -> Convert:
    """What writing does to a weight: GGUF keeps vectors in float32."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.float() if target == "gguf" and tensor.dim() == 1 else tensor.to(dtype)

    return convert


def _check(
    source: Checkpoint, written: Path, name: str, target: Target, dtype: torch.dtype, progress: Progress
) -> float:
    """`check_logits` of the file or folder `written`, which will be called `name`."""
    # float32 holds the values of a file in any dtype; a folder is read as it is
    found = open_checkpoint(written, torch.float32 if target == "gguf" else None)
    total = len(source.spec.sublayers) + len(found.spec.sublayers)
    with progress.stage("check logits", total) as advance:
        return check_logits(source, found, name, _as_written(target, dtype), advance)


@contextlib.contextmanager
def _written_folder(
    checkpoint: Checkpoint, path: Path, write: Callable[..., str], dtype: torch.dtype, limit: int, card: CardFacts,
    overwrite: bool, progress: Progress,
) -> Iterator[tuple[Path, str]]:  # fmt: skip
    """The folder, which has another name while the body runs, and its kind."""
    with new_folder(path, overwrite) as folder:
        with _stage(checkpoint, path, progress) as advance:
            kind = write(checkpoint, folder, dtype, limit, advance)
        (folder / "README.md").write_text(model_card(checkpoint, kind, path.name, card), encoding="utf-8")
        checkpoint.check_unchanged()
        yield folder, kind


@contextlib.contextmanager
def _written_gguf(
    checkpoint: Checkpoint, path: Path, dtype: torch.dtype, overwrite: bool, progress: Progress
) -> Iterator[tuple[Path, str]]:
    """The file, which has another name while the body runs, and its architecture."""
    with atomic_files(path) as make:
        pending = make(path.name)
        with _stage(checkpoint, path, progress) as advance:
            kind = gguf.write(checkpoint, pending.file, dtype, advance, path.stem)
        pending.complete()
        checkpoint.check_unchanged()
        with pending.visible() as unnamed:
            yield unnamed, kind
        pending.publish(path, overwrite)


def _stage(checkpoint: Checkpoint, path: Path, progress: Progress) -> contextlib.AbstractContextManager[Advance]:
    return progress.stage(f"write {path.name}", len(checkpoint.spec.tensor_shapes()))


def export_model(
    model: str | Path,
    output: str | Path,
    target: Target,
    *,
    dtype: str | torch.dtype | None = None,
    dequantize: bool = False,
    check: bool = True,
    license: str | None = None,
    perplexity: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `model`, dense or pruned, in the format of `target`.

    Args:
        model: our file, a Hugging Face folder or hub id, or a GGUF file.
        output: the folder to write, or the file for `gguf`.
        target: `hf`, a Hugging Face folder: a stock class where one fits, else our own class with its Python files;
            `gguf`, a file for llama.cpp; `deci`, a DeciLM folder for vLLM, SGLang, TensorRT-LLM and MLX-LM.
        dtype: of the weights; by default the source's.
        dequantize: write what the codes of a quantised model stand for.
        check: read what was written, and compare its logits with the model's before it takes its name.
        license: of the model card, as the hub names it.
        perplexity: of the model card, such as `12.3 on wikitext2`.
        push_to: repository `OWNER/NAME` of the hub, to upload it to.
        private: make that repository private, where it is made.
        max_shard_size: bytes, or text such as `5GB`, above which a folder's weights go to several files.
        overwrite: let `output` replace what is there, but never what the model is read from.
        progress: bars on stderr; by default none.

    Returns:
        What was written, and how near its logits are.

    Raises:
        InputError: before any long work where that is possible. No partial output is left.
    """
    progress = progress or Progress()
    path = as_path(output, "output")
    limit = parse_size(max_shard_size)
    if push_to is not None:
        check_repository(push_to)
    checkpoint = open_checkpoint(model)
    check_target(target, checkpoint.spec, checkpoint.name)
    _check_dense(checkpoint, dequantize)
    chosen = resolve_dtype(dtype) or checkpoint.dtype
    nbytes = checkpoint.spec.num_parameters() * chosen.itemsize
    if target == "gguf":
        check_destination(path, checkpoint.source_files, overwrite, nbytes)
        writing = _written_gguf(checkpoint, path, chosen, overwrite, progress)
    else:
        check_folder(path, checkpoint.source_files, overwrite, nbytes)
        card = CardFacts(license, perplexity)
        writing = _written_folder(checkpoint, path, _FOLDERS[target], chosen, limit, card, overwrite, progress)
    with writing as (unnamed, kind):
        distance = _check(checkpoint, unnamed, str(path), target, chosen, progress) if check else None
    url = None if push_to is None else push(path, push_to, private)
    return ExportResult(path, target, kind, distance, url)
