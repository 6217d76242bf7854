"""ShortGPT on Mamba and RWKV: a Hugging Face folder in, a stock Hugging Face folder with fewer blocks out.

The runtime does not run these models; Transformers loads the output as any model of its family. What
was decided is in `depthprune_plan.json` inside the folder, in the parent's numbering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet
from depthprune_runtime.host.devices import resolve_device, resolve_dtype
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.recurrent.blocks import (
    batches,
    blocks_for_sparsity,
    drop_blocks,
    family_of,
    num_parameters,
    score_model,
)
from depthprune_runtime.pruning.recurrent.folder import (
    Encode,
    check_output,
    load_encode,
    load_model,
    quiet_transformers,
    read_config,
    write_folder,
)
from depthprune_runtime.pruning.shortgpt.options import PROTECTED_SCORES, RANKINGS, Score
from depthprune_runtime.pruning.shortgpt.ranking import BlockScores, removal_order

Calibration = Tensor | CalibrationSet | Callable[[Encode], CalibrationSet]


@dataclass(frozen=True)
class OtherPruneResult:
    """What `prune_other` did. Blocks are numbered as in the parent; parameters include embeddings, tied ones once.

    order: all removable blocks, the first to go first; scores: None where the order needs no data; settings: all that
    decided it, as JSON.
    """

    path: Path
    model_type: str
    parent_blocks: int
    parent_parameters: int
    parameters: int
    order: list[int]
    scores: BlockScores | None
    dropped: list[int]
    settings: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Parameters removed / parent parameters."""
        return 1.0 - self.parameters / self.parent_parameters


def _check_request(blocks: int | None, sparsity: float | None, score: str, count: int, removable: int) -> None:
    """All that can be refused before weights are read."""
    if score not in RANKINGS:
        raise InputError(f"score: expected one of {', '.join(RANKINGS)}, got {score!r}")
    if (blocks is None) == (sparsity is None):
        raise InputError("expected exactly one of blocks and sparsity")
    if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or not 0 <= blocks <= removable):
        raise InputError(f"blocks: expected 0 to {removable} of {count}, got {blocks!r}")
    if sparsity is not None and not (isinstance(sparsity, int | float) and 0.0 <= sparsity < 1.0):
        raise InputError(f"sparsity: expected a number from 0 to below 1, got {sparsity!r}")


def _calibrate(folder: Path, calibration: Calibration, config: Any) -> CalibrationSet:
    """The windows, made with the model's own tokenizer where the caller gave a function, and checked."""
    if isinstance(calibration, Tensor):
        data = CalibrationSet(calibration, {"text": None, "shape": list(calibration.shape)})
    elif isinstance(calibration, CalibrationSet):
        data = calibration
    else:
        data = calibration(load_encode(folder))
    windows = data.windows
    if windows.dtype != torch.int64 or windows.dim() != 2 or windows.numel() == 0:
        raise InputError(
            f"calibration: expected int64 windows [N, S], none empty, got {windows.dtype} {list(windows.shape)}"
        )
    if not 0 <= int(windows.min()) <= int(windows.max()) < config.vocab_size:
        raise InputError(
            f"calibration: expected token ids from 0 to below {config.vocab_size}, got {int(windows.min())} to "
            f"{int(windows.max())}"
        )
    context = getattr(config, "context_length", None)  # RWKV: the most tokens of one forward pass
    if context is not None and windows.shape[1] > context:
        raise InputError(f"seq_len: expected at most the model's context of {context}, got {windows.shape[1]}")
    return data


def _plan(result: OtherPruneResult, source: Path) -> dict[str, Any]:
    return {
        "method": "shortgpt",
        "parent": source.resolve().name,
        "model_type": result.model_type,
        "parent_blocks": result.parent_blocks,
        "dropped_blocks": result.dropped,
        "parent_parameters": result.parent_parameters,
        "parameters": result.parameters,
        "sparsity": result.sparsity,
        "settings": result.settings,
    }


def prune_other(
    model_folder: str | Path,
    output_folder: str | Path,
    *,
    blocks: int | None = None,
    sparsity: float | None = None,
    calibration: Calibration,
    score: Score = "block-influence",
    protect_last: bool | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> OtherPruneResult:
    """Drop whole blocks of a Mamba, Falcon-Mamba, Mamba-2 or RWKV-4 model by `score`; see `shortgpt`.

    model_folder: a dense Hugging Face model; output_folder: new or empty; blocks: how many to drop, or
    sparsity: least share of parameters to remove, embeddings included; calibration: windows [N, S] int64,
    or a function that makes a `CalibrationSet` from the model's `encode` (text -> ids, no special tokens);
    it is not called for scores that need no data. protect_last: see `shortgpt.plan_shortgpt`. dtype: to
    compute in and of the output, default the source's. The model must fit in memory. Raises InputError before
    any long work where that is possible, and leaves no partial folder.
    """
    protect_last = score in PROTECTED_SCORES if protect_last is None else protect_last
    source, path, bars = Path(model_folder), Path(output_folder), progress or Progress()
    target, wanted = resolve_device(device), resolve_dtype(dtype)
    config = read_config(source)
    count = int(config.num_hidden_layers)
    removable = count - family_of(config.model_type).min_blocks
    _check_request(blocks, sparsity, score, count, removable)
    check_output(path)
    data, scores = None, None
    if score in ("block-influence", "relative-magnitude"):
        data = _calibrate(source, calibration, config)
    with quiet_transformers():
        with bars.stage("read weights", 1) as advance:
            model = load_model(source, wanted)
            advance()
        number = blocks if sparsity is None else blocks_for_sparsity(model, sparsity, removable)
        before = num_parameters(model)
        if data is not None:
            with bars.stage("score blocks", len(batches(data.windows))) as advance:
                scores = score_model(model.to(target), data.windows, advance)
            del model
        order = removal_order(score, scores, count, protect_last)
        dropped = sorted(order[:number])
        with bars.stage(f"write {path.name}", 1) as advance:
            if data is not None:
                model = load_model(source, wanted)  # scoring moved it, and rescales RWKV's weights in place
            drop_blocks(model, dropped)
            settings = {
                "blocks": number,
                "score": score,
                "protect_last": protect_last,
                "calibration": None if data is None else data.description,
                "removal_order": order,
                "scores": None
                if scores is None
                else {"block-influence": scores.block_influence, "relative-magnitude": scores.relative_magnitude},
            }
            result = OtherPruneResult(
                path, config.model_type, count, before, num_parameters(model), order, scores, dropped, settings
            )
            write_folder(model, source, path, _plan(result, source))
            advance()
    return result
