"""`prune`: dense model in, one pruned file out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint, write_native
from depthprune_runtime.checkpoint.container import check_destination
from depthprune_runtime.errors import InputError
from depthprune_runtime.placement import resolve_device, resolve_dtype
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.calibration import CalibrationSet, calibration_set
from depthprune_runtime.pruning.names import METHODS, SCORES, Method, Score
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.pruning.shortgpt import block_pairs, plan_shortgpt
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.texts import load_text
from depthprune_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did. sparsity = parameters removed / parent parameters, embeddings included."""

    path: Path
    parent: DecoderSpec
    spec: DecoderSpec
    plan: PrunePlan

    @property
    def sparsity(self) -> float:
        return 1.0 - self.spec.num_parameters() / self.parent.num_parameters()


def blocks_for_sparsity(spec: DecoderSpec, sparsity: float, removable: int) -> int:
    """Fewest blocks whose removal reaches `sparsity` of all parameters, embeddings included (as the papers count)."""
    if not (isinstance(sparsity, int | float) and 0.0 <= sparsity < 1.0):
        raise InputError(f"sparsity: expected a number from 0 to below 1, got {sparsity!r}")
    pairs = block_pairs(spec)
    per_block = max(sum(spec.sublayer_parameters(i) for i in pair) for pair in pairs)
    total = spec.num_parameters()
    blocks = math.ceil(sparsity * total / per_block - 1e-9)
    if blocks > removable:
        raise InputError(
            f"sparsity: {sparsity} would take {blocks} blocks, only {removable} of {len(pairs)} can go; "
            f"the most is {removable * per_block / total:.3f} (embeddings count and stay)"
        )
    return blocks


def _block_count(spec: DecoderSpec, blocks: int | None, sparsity: float | None) -> int:
    if (blocks is None) == (sparsity is None):
        raise InputError("expected exactly one of blocks and sparsity")
    removable = len(block_pairs(spec)) - 1  # at least one block stays, whichever it is
    if sparsity is not None:
        return blocks_for_sparsity(spec, sparsity, removable)
    assert blocks is not None
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 0 <= blocks <= removable:
        raise InputError(f"blocks: expected 0 to {removable} of {removable + 1}, got {blocks!r}")
    return blocks


def calibrate(checkpoint: Checkpoint, text: str, samples: int, seq_len: int, seed: int) -> CalibrationSet:
    """Calibration windows for `checkpoint` from a named text or a file."""
    contents = load_text(text)
    # windows are cut from the middle of the text, so no BOS: only the first would have one
    tokenizer = Tokenizer(checkpoint)
    name = text if "/" not in text else Path(text).name
    return calibration_set(
        name, contents, lambda t: tokenizer.encode(t, add_special_tokens=False), samples, seq_len, seed
    )


def write(checkpoint: Checkpoint, output: Path, progress: Progress) -> None:
    """Write `checkpoint` with a bar."""
    total = len(checkpoint.spec.tensor_shapes()) + len(checkpoint.assets)
    with progress.stage(f"write {output.name}", total) as advance:
        write_native(output, checkpoint, lambda _: advance())


def prune(
    model: str | Path,
    output: str | Path,
    method: Method = "shortgpt",
    *,
    blocks: int | None = None,
    sparsity: float | None = None,
    calibration: str = "builtin",
    samples: int = 128,
    seq_len: int = 256,
    seed: int = 0,
    score: Score = "block-influence",
    protect_last: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune `model` with `method` and write one self-contained file to `output`.

    model: our file, a Hugging Face folder or hub id, or a GGUF file; blocks: whole blocks to remove, or
    sparsity: least share of parameters to remove, embeddings included; calibration: a named text
    (`texts.NAMED_TEXTS`) or a UTF-8 file, of which `samples` windows of `seq_len` tokens are drawn by
    `seed`; score, protect_last: see `shortgpt`; dtype: of the output, default the source's. Raises
    InputError before any long work where that is possible, and leaves no partial file.
    """
    progress = progress or Progress()
    path = Path(output)
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if score not in SCORES:
        raise InputError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    target = resolve_device(device)
    parent = open_checkpoint(model, resolve_dtype(dtype))
    count = _block_count(parent.spec, blocks, sparsity)
    check_destination(path)
    data = calibrate(parent, calibration, samples, seq_len, seed)
    with progress.stage("read weights", len(parent.spec.tensor_shapes())) as advance:
        digest = parent.digest(lambda _: advance())
    with progress.stage("score blocks", len(block_pairs(parent.spec))) as advance, torch.inference_mode():
        plan = plan_shortgpt(parent, count, data, target, parent.dtype, score, protect_last, digest, advance)
    pruned = PrunedCheckpoint(parent, plan)
    write(pruned, path, progress)
    return PruneResult(path, parent.spec, pruned.spec, plan)


def import_model(
    model: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> DecoderSpec:
    """Write dense `model` unchanged as one self-contained file of our own."""
    path = Path(output)
    check_destination(path)
    checkpoint = open_checkpoint(model, resolve_dtype(dtype))
    write(checkpoint, path, progress or Progress())
    return checkpoint.spec
