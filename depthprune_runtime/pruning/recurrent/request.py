"""What `prune` asks of a Mamba or RWKV model: what makes no sense there is refused, the rest goes to `prune_other`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depthprune_runtime.checkpoint.shards import DEFAULT_MAX_SHARD_SIZE, parse_size
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet, calibration_set
from depthprune_runtime.fitting.options import Repair, RepairOptions
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.amount import Amount
from depthprune_runtime.pruning.method import Method, MethodOptions
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.recurrent.folder import Encode
from depthprune_runtime.pruning.recurrent.prune import prune_other
from depthprune_runtime.pruning.result import PruneResult
from depthprune_runtime.pruning.shortgpt.options import ShortGPTOptions
from depthprune_runtime.texts import load_text


@dataclass(frozen=True)
class RecurrentRequest:
    """Arguments of `prune` that say what goes and what decides it."""

    amount: Amount
    method: Method[Any]
    options: MethodOptions
    repair: Repair | RepairOptions
    calibration: str
    samples: int | None
    seq_len: int | None
    seed: int | None


def _refuse(what: str) -> InputError:
    return InputError(
        f"Mamba and RWKV models take no option {what}: whole blocks go, without repair, into a new folder"
    )


def _check(asked: RecurrentRequest, max_shard_size: int, overwrite: bool) -> None:
    if not isinstance(asked.options, ShortGPTOptions):
        raise InputError(f"method: Mamba and RWKV models can only be pruned by shortgpt, got {asked.method.name}")
    if asked.amount.sublayers is not None:
        raise InputError("sublayers: Mamba and RWKV blocks are not made of attention and FFN; give blocks or sparsity")
    if asked.repair not in ("auto", "none"):
        raise _refuse("repair")
    if overwrite:
        raise _refuse("overwrite (--force)")
    if max_shard_size != parse_size(DEFAULT_MAX_SHARD_SIZE):
        raise _refuse("max_shard_size (--max-shard-size)")


def prune_recurrent(
    model: str | Path,
    output: Path,
    asked: RecurrentRequest,
    max_shard_size: int,
    overwrite: bool,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    progress: Progress,
) -> PruneResult:
    """Drop whole blocks by ShortGPT; arguments as in `prune`."""
    _check(asked, max_shard_size, overwrite)
    options = asked.method.resolved(asked.options, repairs=False)
    text = load_text(asked.calibration)
    name = asked.calibration if "/" not in asked.calibration else Path(asked.calibration).name
    suits = asked.method.windows(options)
    assert suits is not None
    samples = suits[0] if asked.samples is None else asked.samples
    seq_len = suits[1] if asked.seq_len is None else asked.seq_len

    def windows(encode: Encode) -> CalibrationSet:
        return calibration_set(name, text, encode, samples, seq_len, asked.seed)

    result = prune_other(
        model,
        output,
        blocks=asked.amount.blocks,
        sparsity=asked.amount.sparsity,
        calibration=windows,
        score=options.score,
        protect_last=options.protect_last,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    settings = {"model_type": result.model_type, "parent_blocks": result.parent_blocks, **result.settings}
    plan = PrunePlan("shortgpt", "", tuple(Drop(block) for block in result.dropped), settings)
    return PruneResult(result.path, plan, result.parent_parameters, result.parameters)
