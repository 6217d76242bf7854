"""What quantisation costs in quality, alone and with pruning in both orders: one CSV row a configuration.

    python benchmarks/bench_quantization.py WEIGHTS.gguf [--variants "int8;int4"] [--peer llama.cpp=FILE.gguf] [--json]

Perplexity is WikiText-2 test as it stands, the first 32 windows of 1024 tokens, by the runtime on the quantised
weights (inputs of a product in 8 bits, as when it generates). Calibrated on WikiText-2 train text. A peer's GGUF file
made of the same bf16 weights is dequantised and run in bf16. Needs $DEPTHPRUNE_DATA (or the extra [data]).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import append_rows, environment, print_json

from depthprune_runtime import ShortGPTOptions

WINDOWS = 32
SEQ_LEN = 1024
# Variants: steps in order, each a function's name and its options.
SHORTGPT = ("prune", {"method": "shortgpt", "blocks": 3})
AS_PRINTED = ShortGPTOptions(score="block-influence")
DROPPED = ("prune", {"options": AS_PRINTED, "blocks": 3, "repair": "none"})
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "bf16": [],
    "int8": [("quantize", {"bits": 8})],
    "int4": [("quantize", {"bits": 4})],
    "int4, gptq only": [("quantize", {"bits": 4, "mend": False})],
    "int4, round to nearest": [("quantize", {"bits": 4, "method": "rtn"})],
    "shortgpt": [SHORTGPT],
    "shortgpt, then int8": [SHORTGPT, ("quantize", {"bits": 8})],
    "shortgpt, then int4": [SHORTGPT, ("quantize", {"bits": 4})],
    "shortgpt as printed": [DROPPED],
    "shortgpt as printed, then int4": [DROPPED, ("quantize", {"bits": 4})],
    "int4, then shortgpt as printed": [("quantize", {"bits": 4}), DROPPED],
}


class Maker:
    """Carries out variants, and keeps what several of them begin with."""

    def __init__(self, dense: Path, folder: Path) -> None:
        self._made: dict[str, tuple[Path, float]] = {"[]": (dense, 0.0)}
        self._folder = folder

    def make(self, steps: list[tuple[str, dict[str, Any]]]) -> tuple[Path, float]:
        """The file, and the seconds that all its steps took."""
        from depthprune_runtime import prune, quantize

        key = str(steps)
        if key not in self._made:
            source, before = self.make(steps[:-1])
            name, options = steps[-1]
            path = self._folder / f"{len(self._made)}.safetensors"
            start = time.perf_counter()
            {"prune": prune, "quantize": quantize}[name](source, path, calibration="wikitext2", **options)
            self._made[key] = path, before + time.perf_counter() - start
        return self._made[key]


def score(model: Path, dense: Path) -> dict[str, Any]:
    import torch

    from depthprune_runtime import Runtime, perplexity
    from depthprune_runtime.checkpoint import open_checkpoint
    from depthprune_runtime.texts import load_text

    checkpoint = open_checkpoint(model, torch.bfloat16)
    runtime = Runtime.load(model, dtype=torch.bfloat16)
    if runtime.tokenizer is None:  # a peer's file of weights alone
        runtime.tokenizer = Runtime.load(dense).tokenizer
    found = perplexity(runtime, load_text("wikitext2-test"), SEQ_LEN, WINDOWS)
    return {
        "parameters": runtime.spec.num_parameters(),
        "weight_mb": round(checkpoint.weight_bytes() / 1e6, 1),
        "perplexity": round(found.perplexity, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by ;")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE.gguf")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from depthprune_runtime import import_model

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        import_model(args.weights, dense, dtype="bf16")
        maker = Maker(dense, Path(folder))
        work = [(name, None) for name in args.variants.split(";") if name]
        work += [(name, Path(file)) for name, file in (peer.split("=", 1) for peer in args.peer)]
        for name, file in work:
            model, seconds = (file, 0.0) if file is not None else maker.make(VARIANTS[name])
            found = score(model, dense)
            if file is not None:  # dequantised to be scored: its own size is the file's
                found["weight_mb"] = round(file.stat().st_size / 1e6, 1)
            row = {"model": "SmolLM2-135M-Instruct", "variant": name, **found, "seconds": round(seconds, 1)}
            rows.append(row | environment())
            append_rows("quantization", rows[-1:])
            if not args.json:
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.json:
        print_json(rows)


if __name__ == "__main__":
    main()
