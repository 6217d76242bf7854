"""`prune`: dense model in, one pruned file out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.checkpoint.outputs import as_path, check_destination, check_output
from depthprune_runtime.checkpoint.shards import DEFAULT_MAX_SHARD_SIZE, parse_size
from depthprune_runtime.checkpoint.writing import write
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet
from depthprune_runtime.fitting.calibrator import Calibrator
from depthprune_runtime.fitting.options import REPAIR_WINDOWS, RepairOptions
from depthprune_runtime.host.devices import resolve_device, resolve_dtype
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.amount import Request
from depthprune_runtime.pruning.finercut.goal import removable_sublayers
from depthprune_runtime.pruning.finercut.search import plan_finercut
from depthprune_runtime.pruning.flattengpt.grouping import check_merges, plan_flattengpt
from depthprune_runtime.pruning.names import REPAIRS, Method, Repair
from depthprune_runtime.pruning.options import (
    STRENGTHS,
    FinerCutOptions,
    FlattenGPTOptions,
    MethodOptions,
    ShortGPTOptions,
    method_options,
    resolved,
)
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.pruning.rebuild import Narrowing, Rebuild
from depthprune_runtime.pruning.shortgpt import block_pairs, plan_shortgpt
from depthprune_runtime.pruning.spans import dropped_blocks, equal_errors, plan_after_repair
from depthprune_runtime.pruning.surgery import PrunedCheckpoint, require_dense
from depthprune_runtime.spec import AttentionSpec, DecoderSpec
from depthprune_runtime.texts import text_file

# Calibration windows that a method decides from: (samples, seq_len), as in the papers' code.
_SCORING_WINDOWS = {"shortgpt": (128, 256), "finercut": (10, 256), "flattengpt": (64, 512)}
_AFTER_REPAIR_WINDOWS = (64, 256)  # of the span errors: 32,768 tokens chose the same spans of SmolLM2 as 16,384


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


def prune(
    model: str | Path,
    output: str | Path,
    method: Method = "shortgpt",
    *,
    blocks: int | None = None,
    sublayers: int | None = None,
    sparsity: float | None = None,
    repair: Repair | RepairOptions = "ridge",
    calibration: str = "builtin",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune `model` with `method` and write one self-contained file to `output`.

    Exactly one of blocks, sublayers and sparsity says how much goes.

    Args:
        model: our file, a Hugging Face folder or hub id, or a GGUF file.
        output: the file to write.
        method: `shortgpt`, `finercut` or `flattengpt`.
        blocks: so many blocks fewer; for FinerCut their parameters.
        sublayers: so many sub-layers fewer, FinerCut only.
        sparsity: the least share of parameters to remove, embeddings included.
        repair: `ridge`, `none`, or RepairOptions.
        calibration: a named text (`texts.NAMED_TEXTS`) or a UTF-8 file, of which windows are drawn.
        samples: windows; by default what suits the method, and the repair.
        seq_len: tokens in each; likewise.
        seed: which windows are drawn; None takes the first ones.
        device: `auto` is CUDA where there is one.
        dtype: of the output; by default the source's.
        max_shard_size: bytes, or text such as `5GB`, above which the weights go to several files beside `output`.
        overwrite: let `output` replace a file that is there, but never one of the model's own.
        progress: bars on stderr; by default none.
        **options: fields of the method's options, such as `ShortGPTOptions`.

    Returns:
        The plan, and the specs before and after.

    Raises:
        InputError: before any long work where that is possible. No partial file is left.
    """
    progress = progress or Progress()
    path = as_path(output, "output")
    max_shard_size = parse_size(max_shard_size)
    request = Request(blocks, sublayers, sparsity)
    request.check(method)
    own = method_options(method, options)
    mending = _repair_options(repair, method)
    chosen = resolved(own, mending is not None)
    target = resolve_device(device)
    parent = open_checkpoint(model, resolve_dtype(dtype))
    require_dense(parent)
    _check_request(request, parent.spec, chosen)
    sources = (*parent.source_files, *text_file(calibration))
    check_output(path, sources, overwrite)
    state = getattr(chosen, "state_file", None)
    if state is not None:
        check_destination(as_path(state, "state_file"), (*sources, path), overwrite=True)
    calibrator = Calibrator(parent, calibration, samples, seq_len, seed)
    after_repair = "after-repair" in (getattr(chosen, "score", None), getattr(chosen, "grouping", None))
    data = calibrator.windows(*(_AFTER_REPAIR_WINDOWS if after_repair else _SCORING_WINDOWS[method]))
    mending_data = _mending_windows(calibrator, chosen, mending)
    with progress.stage("read weights", len(parent.spec.tensor_shapes())) as advance:
        digest = parent.digest(lambda _: advance())
    with torch.inference_mode():
        plan = _decide(parent, request, chosen, data, target, digest, progress)
        pruned, plan = _rebuild(parent, plan, chosen, mending, mending_data, target, progress)
    write(pruned, path, progress, max_shard_size, overwrite)
    return PruneResult(path, parent.spec, pruned.spec, plan)


def _repair_options(repair: Repair | RepairOptions, method: Method) -> RepairOptions | None:
    if isinstance(repair, RepairOptions):
        return repair.suited(STRENGTHS[method])
    if repair not in REPAIRS:
        raise InputError(f"repair: expected one of {', '.join(REPAIRS)}, got {repair!r}")
    return RepairOptions().suited(STRENGTHS[method]) if repair == "ridge" else None


def _mending_windows(
    calibrator: Calibrator, options: MethodOptions, mending: RepairOptions | None
) -> CalibrationSet | None:
    """Windows of the walk that narrows and repairs, drawn before any long work; None where there is no such walk."""
    if mending is None and not isinstance(options, FlattenGPTOptions):
        return None
    own = (None, None) if mending is None else (mending.samples, mending.seq_len)
    return calibrator.windows(*REPAIR_WINDOWS, at_most=True, own=own)


def _check_request(request: Request, spec: DecoderSpec, options: MethodOptions) -> None:
    """Refuse impossible amounts before any long work."""
    if isinstance(options, FinerCutOptions):
        request.goal(spec).most_steps(spec, removable_sublayers(spec, options.front_protection, options.only))
    elif isinstance(options, FlattenGPTOptions):
        check_merges(len(block_pairs(spec)), request.block_count(spec, 1.0 - options.keep_width), options)
    else:
        blocks = request.block_count(spec)
        if options.score == "after-repair":
            count = len(block_pairs(spec))
            dropped_blocks(equal_errors(count), count, blocks, bool(options.protect_last))


def _decide(
    parent: Checkpoint,
    request: Request,
    options: MethodOptions,
    data: CalibrationSet,
    device: torch.device,
    digest: str,
    progress: Progress,
) -> PrunePlan:
    """The plan of the method: which sub-layers are dropped or merged."""
    if isinstance(options, FinerCutOptions):
        state = Path(options.state_file) if options.state_file else None
        goal = request.goal(parent.spec)
        return plan_finercut(
            parent,
            goal,
            data,
            device,
            parent.dtype,
            distance=options.distance,
            front_protection=options.front_protection,
            mode="fast" if options.fast else "exact",
            only=options.only,
            state_file=state,
            parent_digest=digest,
            progress=progress,
        )
    with progress.stage("score blocks", len(block_pairs(parent.spec))) as advance:
        if isinstance(options, ShortGPTOptions):
            count = request.block_count(parent.spec)
            if options.score == "after-repair":
                return plan_after_repair(parent, count, data, device, bool(options.protect_last), digest, advance)
            return plan_shortgpt(
                parent, count, data, device, parent.dtype, options.score, options.protect_last, digest, advance
            )
        merges = request.block_count(parent.spec, 1.0 - options.keep_width)
        return plan_flattengpt(parent, merges, data, device, options, digest, advance)


def kept_units(parent: DecoderSpec, plan: PrunePlan, keep_width: float) -> dict[int, int]:
    """Units that each merged sub-layer keeps, by its first source."""
    units = {}
    blocks = block_pairs(parent)
    for edit in plan.flattened():
        for index in blocks[edit.blocks[0]]:
            spec = parent.sublayers[index]
            own = spec.num_kv_heads if isinstance(spec, AttentionSpec) else spec.intermediate_size
            wide = own * len(edit.blocks)
            kept = own + round(keep_width * (wide - own))
            if not isinstance(spec, AttentionSpec) and own % 256 == 0:
                kept = min(wide, 256 * math.ceil(kept / 256))  # kernels and exports like whole tiles
            if kept < wide:
                units[index] = kept
    return units


def _rebuild(
    parent: Checkpoint,
    plan: PrunePlan,
    options: MethodOptions,
    mending: RepairOptions | None,
    data: CalibrationSet | None,
    device: torch.device,
    progress: Progress,
) -> tuple[PrunedCheckpoint, PrunePlan]:
    """Narrow and repair what the plan leaves."""
    narrowing = None
    if isinstance(options, FlattenGPTOptions):
        narrowing = Narrowing(kept_units(parent.spec, plan, options.keep_width), options)
    if not plan.edits or (mending is None and (narrowing is None or not narrowing.units)):
        return PrunedCheckpoint(parent, plan), plan
    assert data is not None
    calibration = {"calibration": data.description}
    size = {name: data.description[name] for name in ("samples", "seq_len")}
    walked: dict[str, Any] = {"repair": None if mending is None else {**asdict(mending), **size, **calibration}}
    if narrowing is not None and narrowing.units:
        walked["narrowing"] = calibration
    plan = replace(plan, settings={**plan.settings, **walked})
    rebuild = Rebuild(parent, plan, narrowing, mending, device)
    walk = rebuild.walk(data.windows)
    with progress.stage("repair" if mending is not None else "narrow", walk.steps) as advance:
        return rebuild.run(walk, advance)
