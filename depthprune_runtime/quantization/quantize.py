"""`quantize`: a dense or pruned model in, one file of 8 or 4 bits a weight out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.checkpoint.outputs import as_path, check_output
from depthprune_runtime.checkpoint.shards import DEFAULT_MAX_SHARD_SIZE, parse_size
from depthprune_runtime.checkpoint.writing import write
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet
from depthprune_runtime.fitting.calibrator import Calibrator
from depthprune_runtime.fitting.options import RepairOptions
from depthprune_runtime.fitting.walk import Walk
from depthprune_runtime.host.devices import resolve_device, resolve_dtype
from depthprune_runtime.progress import Progress
from depthprune_runtime.quantization.calibrated import Calibrated
from depthprune_runtime.quantization.options import Bits, GroupSize, HeadBits, QuantizeOptions, QuantMethod
from depthprune_runtime.quantization.rtn import rtn
from depthprune_runtime.quantization.view import QuantizedCheckpoint
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.texts import text_file
from depthprune_runtime.weights.quantized import QuantSpec

_WINDOWS = (128, 512)  # of the calibration: (samples, seq_len)
_MEND = RepairOptions()


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` did. weight_bytes: of all weights as they are stored; bytes_per_token: of those that one decode
    step at batch 1 reads; parent_*: the same of the model it came from."""

    path: Path
    spec: DecoderSpec
    method: QuantMethod
    quantization: Mapping[str, QuantSpec]
    weight_bytes: int
    parent_weight_bytes: int
    bytes_per_token: int
    parent_bytes_per_token: int


def requested(parent: Checkpoint, quant: QuantSpec, head_bits: int) -> dict[str, QuantSpec]:
    """Name -> how it is to be quantised, of every projection of `parent` that is not so yet.

    Raises InputError for one that is quantised in another way: rounding twice would cost accuracy unseen.
    """
    head = parent.spec.head_name
    wanted = dict.fromkeys(parent.spec.projections(), quant)
    if head_bits == 16:
        del wanted[head]
    else:
        wanted[head] = QuantSpec(head_bits, quant.group_size, quant.symmetric)
    for name, found in parent.quantization.items():
        if wanted.pop(name, None) != found:
            raise InputError(
                f"{parent.name}: expected weights that are dense or quantised in the same way, got {name} of "
                f"{found.bits} bits in groups of {found.group_size}; quantise its dense parent"
            )
    return wanted


def quantize(
    model: str | Path,
    output: str | Path,
    bits: Bits = 8,
    *,
    group_size: GroupSize | None = None,
    symmetric: bool = True,
    method: QuantMethod = "auto",
    mend: bool = True,
    lm_head_bits: HeadBits = 8,
    calibration: str = "builtin",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantise every projection of `model`, dense or pruned, and write one self-contained file to `output`.

    Args:
        model: our file, a Hugging Face folder or hub id, or a GGUF file.
        output: the file to write.
        bits: 8 or 4.
        group_size: inputs that share a scale, 32, 64 or 128; by default 64 at 8 bits, 32 at 4.
        symmetric: no zero points.
        method: `rtn` (round to nearest), `gptq`, or `auto`: gptq at 4 bits, rtn at 8.
        mend: with gptq, solve output projections anew before they are rounded, against the errors before them; not in
            models whose sub-layers end in a norm.
        lm_head_bits: of the head, always by rtn; 16 leaves it as it is. Where embeddings are tied, it is the embedding.
        calibration: what gptq sees, as in `prune`.
        samples: likewise.
        seq_len: likewise.
        seed: likewise.
        device: `auto` is CUDA where there is one.
        dtype: of what stays dense; by default the source's.
        max_shard_size: as in `prune`.
        overwrite: as in `prune`.
        progress: bars on stderr; by default none.

    Returns:
        The method that was used, and bytes before and after.

    Raises:
        InputError: before any long work where that is possible. No partial file is left.
    """
    progress = progress or Progress()
    path = as_path(output, "output")
    max_shard_size = parse_size(max_shard_size)
    options = QuantizeOptions(bits, group_size, symmetric, method, mend, lm_head_bits)
    size, chosen = options.resolved()
    quant = QuantSpec(bits, size, symmetric)
    target = resolve_device(device)
    parent = open_checkpoint(model, resolve_dtype(dtype))
    wanted = requested(parent, quant, lm_head_bits)
    sources = (*parent.source_files, *(text_file(calibration) if chosen == "gptq" else ()))
    check_output(path, sources, overwrite)
    data = None
    if chosen == "gptq":
        data = Calibrator(parent, calibration, samples, seq_len, seed).windows(*_WINDOWS, at_most=True)
    with torch.inference_mode():
        mending = _MEND if mend and not parent.spec.ends_in_norms else None
        view = quantized_view(parent, wanted, data, mending, target, progress)
    write(view, path, progress, max_shard_size, overwrite)
    return QuantizeResult(
        path,
        view.spec,
        chosen,
        dict(view.quantization),
        view.weight_bytes(),
        parent.weight_bytes(),
        view.bytes_per_token(),
        parent.bytes_per_token(),
    )


def quantized_view(
    parent: Checkpoint,
    wanted: Mapping[str, QuantSpec],
    data: CalibrationSet | None,
    mend: RepairOptions | None,
    device: torch.device,
    progress: Progress,
) -> QuantizedCheckpoint:
    """`parent` with the projections `wanted` quantised: by GPTQ on `data`, or by rtn (None), as the head always is."""
    settings = {
        "method": "rtn" if data is None else "gptq",
        "calibration": None if data is None else data.description,
        "mend": None if data is None or mend is None else asdict(mend),
    }
    view = QuantizedCheckpoint(parent, settings)
    rounded = [name for name in wanted if data is None or name == parent.spec.head_name]
    with progress.stage("round", len(rounded)) as advance:
        for name in rounded:
            view.put(name, rtn(parent.tensor(name).to(device), wanted[name]))
            advance()
    if data is not None:
        walk = Walk(parent, view, data.windows, device, parent.dtype, skip_equal=False)
        with progress.stage("gptq", walk.steps) as advance:
            walk.run(Calibrated(view, wanted, mend, device).visit, advance)
    return view
