"""`prune`: a model in, one pruned file out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.checkpoint.outputs import as_path, check_destination, check_output
from depthprune_runtime.checkpoint.shards import DEFAULT_MAX_SHARD_SIZE, parse_size
from depthprune_runtime.checkpoint.writing import write
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import NO_WINDOWS, CalibrationSet
from depthprune_runtime.fitting.calibrator import Calibrator
from depthprune_runtime.fitting.options import REPAIR_WINDOWS, REPAIRS, Repair, RepairOptions
from depthprune_runtime.fitting.projection import check_all_solvable
from depthprune_runtime.host.devices import resolve_device, resolve_dtype
from depthprune_runtime.options import written
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.amount import Amount
from depthprune_runtime.pruning.by_hand import PlanSource, by_hand
from depthprune_runtime.pruning.method import Method, MethodOptions, Task, all_methods, choose_method
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.pruning.rebuild import Narrowing, Rebuild
from depthprune_runtime.pruning.recurrent.folder import is_recurrent
from depthprune_runtime.pruning.recurrent.request import RecurrentRequest, prune_recurrent
from depthprune_runtime.pruning.result import PruneResult
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.texts import text_file


def prune(
    model: str | Path,
    output: str | Path,
    method: str | None = None,
    *,
    blocks: int | None = None,
    sublayers: int | None = None,
    sparsity: float | None = None,
    options: MethodOptions | None = None,
    plan: PlanSource | None = None,
    drop: str | None = None,
    repair: Repair | RepairOptions = "auto",
    calibration: str = "builtin",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune `model` and write one self-contained file to `output`; of Mamba and RWKV, a Hugging Face folder.

    Exactly one of blocks, sublayers and sparsity says how much goes, or else plan or drop says what.

    Args:
        model: our file, a Hugging Face folder or hub id, or a GGUF file.
        output: the file to write; for Mamba and RWKV a new or empty folder.
        method: `shortgpt` (the default), `finercut` or `flattengpt`; it may be left to `options`.
        blocks: so many blocks fewer; for FinerCut their parameters.
        sublayers: so many sub-layers fewer, FinerCut only.
        sparsity: the least share of parameters to remove, embeddings included.
        options: of the method: ShortGPTOptions, FinerCutOptions or FlattenGPTOptions.
        plan: instead of a method, a PrunePlan, or a JSON file with one or with its edits alone.
        drop: instead of a method, blocks and sub-layers of `model`, such as `21-28,5.attention`.
        repair: `ridge`, `none`, RepairOptions, or `auto`: ridge, and none for Mamba, RWKV and models whose sub-layers
            end in a norm.
        calibration: a named text (`texts.NAMED_TEXTS`) or a UTF-8 file, of which windows are drawn.
        samples: windows; by default what suits the method, and the repair.
        seq_len: tokens in each; likewise.
        seed: which windows are drawn; None takes the first ones.
        device: `auto` is CUDA where there is one.
        dtype: of the output; by default the source's.
        max_shard_size: bytes, or text such as `5GB`, above which the weights go to several files beside `output`.
        overwrite: let `output` replace a file that is there, but never one of the model's own.
        progress: bars on stderr; by default none.

    Returns:
        The plan, and parameters and specs before and after.

    Raises:
        InputError: before any long work where that is possible. No partial file is left.
    """
    progress = progress or Progress()
    path = as_path(output, "output")
    shard_size = parse_size(max_shard_size)
    amount = Amount(blocks, sublayers, sparsity)
    chosen, own = by_hand(plan, drop, amount, method, options) or choose_method(method, options)
    if is_recurrent(model):
        asked = RecurrentRequest(amount, chosen, own, repair, calibration, samples, seq_len, seed)
        return prune_recurrent(model, path, asked, shard_size, overwrite, device, dtype, progress)
    if plan is None and drop is None:
        _check_amount(amount, chosen)
    mending = _repair_options(repair, chosen)
    chosen.resolved(own, mending is not None)  # refuses what makes no sense for any model
    target = resolve_device(device)
    parent = open_checkpoint(model, resolve_dtype(dtype))
    mending = _possible(repair, mending, parent.spec)
    own = chosen.resolved(own, mending is not None)
    chosen.check(amount, parent.spec, own)
    sources = (*parent.source_files, *text_file(calibration))
    check_output(path, sources, overwrite)
    for name, place in written(own):
        check_destination(as_path(place, name), (*sources, path), overwrite=True)
    looks, walks = chosen.windows(own), mending is not None or chosen.narrows(own)
    calibrator = Calibrator(parent, calibration, samples, seq_len, seed) if looks is not None or walks else None
    data = None if calibrator is None or looks is None else calibrator.windows(*looks)
    mending_data = _mending_windows(calibrator, mending) if calibrator is not None and walks else None
    with progress.stage("read weights", len(parent.spec.tensor_shapes())) as advance:
        digest = parent.digest(lambda _: advance())
    with torch.inference_mode():
        decided = chosen.decide(Task(parent, amount, data or NO_WINDOWS, target, digest, progress), own)
        narrowing = chosen.narrowing(parent.spec, decided, own)
        pruned, decided = _rebuild(parent, decided, narrowing, mending, mending_data, target, progress)
    write(pruned, path, progress, shard_size, overwrite)
    before, after = parent.spec.num_parameters(), pruned.spec.num_parameters()
    return PruneResult(path, decided, before, after, parent.spec, pruned.spec)


def _check_amount(amount: Amount, method: Method[Any]) -> None:
    amount.check()
    if amount.sublayers is not None and not method.single_sublayers:
        able = " and ".join(m.name for m in all_methods() if m.single_sublayers)
        raise InputError(f"sublayers: only {able} drops single sub-layers, {method.name} needs blocks or sparsity")


def _repair_options(repair: Repair | RepairOptions, method: Method[Any]) -> RepairOptions | None:
    if isinstance(repair, RepairOptions):
        return repair.suited(method.repair_strength)
    if repair not in REPAIRS:
        raise InputError(f"repair: expected one of {', '.join(REPAIRS)}, got {repair!r}")
    return None if repair == "none" else RepairOptions().suited(method.repair_strength)


def _possible(repair: Repair | RepairOptions, mending: RepairOptions | None, spec: DecoderSpec) -> RepairOptions | None:
    """`mending`, where `spec` has output projections that can be solved anew; without one, `auto` is none."""
    if mending is None or not spec.ends_in_norms:
        return mending
    if repair == "auto":
        return None
    check_all_solvable(spec)
    return mending


def _mending_windows(calibrator: Calibrator, mending: RepairOptions | None) -> CalibrationSet:
    """Windows of the walk that narrows and repairs, drawn before any long work."""
    own = (None, None) if mending is None else (mending.samples, mending.seq_len)
    return calibrator.windows(*REPAIR_WINDOWS, at_most=True, own=own)


def _rebuild(
    parent: Checkpoint,
    plan: PrunePlan,
    narrowing: Narrowing | None,
    mending: RepairOptions | None,
    data: CalibrationSet | None,
    device: torch.device,
    progress: Progress,
) -> tuple[PrunedCheckpoint, PrunePlan]:
    """Narrow and repair what the plan leaves."""
    if not plan.edits or (mending is None and narrowing is None):
        return PrunedCheckpoint(parent, plan), plan
    assert data is not None
    calibration = {"calibration": data.description}
    size = {name: data.description[name] for name in ("samples", "seq_len")}
    walked: dict[str, Any] = {"repair": None if mending is None else {**asdict(mending), **size, **calibration}}
    if narrowing is not None:
        walked["narrowing"] = calibration
    plan = replace(plan, settings={**plan.settings, **walked})
    rebuild = Rebuild(parent, plan, narrowing, mending, device)
    walk = rebuild.walk(data.windows)
    with progress.stage("repair" if mending is not None else "narrow", walk.steps) as advance:
        return rebuild.run(walk, advance)
