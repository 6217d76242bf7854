"""Digests of the files that pruning and quantising write, to show that a change of the code changes none of them.

    python benchmarks/same_files.py [WEIGHTS.gguf] > before.json
    python benchmarks/same_files.py [WEIGHTS.gguf] --compare before.json

Pico models (tests/helpers/pico.py) go through every method, repair and precision; WEIGHTS, if given, through ShortGPT
with a small repair. Prints name and SHA-256 as JSON; with --compare only the names whose file differs, and exit status
1 if there are any. One thread, so that sums have one order; digests of two machines need not agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import pico
import torch
from common import print_json

from depthprune_runtime import prune, quantize
from depthprune_runtime.fitting.options import Repair, RepairOptions
from depthprune_runtime.pruning.method import method_options

FAMILIES = {"llama": torch.float32, "qwen3": torch.bfloat16}
TOKENS = {"samples": 72, "seq_len": 64}  # more than one batch
BLOCKS = {"blocks": 2, **TOKENS}
SHARES = {"grouping": "similarity", "keep_width": 0.5}
AMOUNTS = (*TOKENS, "blocks", "sublayers", "sparsity")  # the rest are options of the method
CASES: dict[str, tuple[str, Repair | RepairOptions, dict[str, Any]]] = {
    "shortgpt, not repaired": ("shortgpt", "none", BLOCKS),
    "shortgpt": ("shortgpt", "ridge", BLOCKS),
    "shortgpt, answered after": ("shortgpt", RepairOptions(answers_for="after", weighting="none"), BLOCKS),
    "shortgpt by magnitude, edited half": (
        "shortgpt",
        RepairOptions(scope="edited", strength=0.5),
        {**TOKENS, "sparsity": 0.2, "score": "relative-magnitude"},
    ),
    "finercut, not repaired": ("finercut", "none", {**TOKENS, "sublayers": 3}),
    "finercut": ("finercut", "ridge", {**TOKENS, "sublayers": 3, "fast": True, "front_protection": 0.0}),
    "finercut of attention": ("finercut", "ridge", {**BLOCKS, "blocks": 1, "only": "attention", "distance": "kl"}),
    "flattengpt, not repaired": ("flattengpt", "none", BLOCKS),
    "flattengpt": ("flattengpt", "ridge", BLOCKS),
    "flattengpt, wide": ("flattengpt", "ridge", {**BLOCKS, "keep_width": 1.0}),
    "flattengpt by similarity": ("flattengpt", "ridge", {**BLOCKS, **SHARES, "selection": "importance"}),
    "flattengpt of pairs, not compensated": (
        "flattengpt",
        "none",
        {**BLOCKS, "pairs_only": True, "compensate": False},
    ),
}
QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int8 gptq": {"bits": 8, "method": "gptq", "symmetric": False, **TOKENS},
    "int4": {"bits": 4, **TOKENS},
    "int4, not mended": {"bits": 4, "mend": False, "lm_head_bits": 16, **TOKENS},
}
QUANTIZED_TOO = ("shortgpt", "finercut, not repaired", "flattengpt")  # in 4 bits


def digest(path: Path) -> str:
    """SHA-256 of the file at `path`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pico_digests(family: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of every file that is made of the pico model `family`."""
    model = pico.build_model(family, FAMILIES[family], num_hidden_layers=6)
    dense = pico.save(model, folder / family)
    out, quantized = folder / "out.safetensors", folder / "quantized.safetensors"
    for name, (method, repair, options) in CASES.items():
        own = method_options(method, {key: value for key, value in options.items() if key not in AMOUNTS})
        rest = {key: value for key, value in options.items() if key in AMOUNTS}
        prune(dense, out, options=own, repair=repair, overwrite=True, **rest)
        yield f"{family}: {name}", digest(out)
        if name in QUANTIZED_TOO:
            quantize(out, quantized, overwrite=True, bits=4, **TOKENS)
            yield f"{family}: {name}, int4", digest(quantized)
    for name, options in QUANTIZED.items():
        quantize(dense, quantized, overwrite=True, **options)
        yield f"{family}: {name}", digest(quantized)


def weights_digests(weights: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of one repaired file of a real model."""
    out = folder / "out.safetensors"
    prune(weights, out, blocks=3, samples=16, seq_len=256, overwrite=True)
    yield f"{weights.name}: shortgpt, repair ridge", digest(out)


def _told(files: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for name, value in files:
        print(f"{value[:16]}  {name}", file=sys.stderr, flush=True)
        yield name, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="?")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="JSON that an earlier run printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            found.update(_told(pico_digests(family, Path(folder))))
        if args.weights is not None:
            found.update(_told(weights_digests(args.weights, Path(folder))))
    if args.compare is None:
        print_json(found)
        return 0
    before = json.loads(args.compare.read_text())
    differing = sorted(name for name in found if before.get(name) != found[name])
    print(f"{len(found)} files, {len(differing)} of them differ", *differing, sep="\n")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
