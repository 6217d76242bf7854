"""FinerCut's searches beside the plain loop of the official script: cost, ranking and quality, one CSV row a search.

    python benchmarks/bench_finercut.py WEIGHTS.gguf [--sublayers 6] [--windows 10] [--seq-len 256] [--json]

The plain loop runs the whole model for every candidate of every step, with the same decoder and the same distance.
Each search starts from nothing and is timed whole, the one dense pass included, in CPU seconds of all threads, which
other work beside it lengthens less than the wall clock (OMP_WAIT_POLICY=passive, or waiting counts). Perplexity is
WikiText-2 test, the first 32 windows of 1024 tokens, of the model without the sub-layers found, not repaired. Needs
$DEPTHPRUNE_DATA.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import append_rows, environment, print_json

from depthprune_runtime import Runtime, import_model, perplexity
from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.fitting.calibrator import Calibrator
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.finercut.distances import OutputDistance
from depthprune_runtime.pruning.finercut.goal import Goal, candidates
from depthprune_runtime.pruning.finercut.search import search
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.texts import load_text

CPU = torch.device("cpu")
DISTANCE = "js_reverse"
FRONT_PROTECTION = 0.4


def plain_loop(decoder: Decoder, windows: torch.Tensor, count: int) -> tuple[list[int], int]:
    """(ranking, sub-layers run over the whole calibration set): every candidate from its first sub-layer."""
    total = len(decoder.sublayers)
    batch = packed([windows.shape[1]] * windows.shape[0], CPU)

    def final(gone: list[int]) -> torch.Tensor:
        states = decoder.embed(windows.flatten())
        for index, sublayer in enumerate(decoder.sublayers):
            if index not in gone:
                states += sublayer(states, batch)
        return decoder.final(states)

    distance = OutputDistance(DISTANCE, windows, final([]), decoder.logits)
    gone: list[int] = []
    evaluations = 0
    with Progress(True).stage("plain loop", count) as advance:
        for _ in range(count):
            scores = {}
            for i in candidates(decoder.spec, gone, FRONT_PROTECTION):
                scores[i] = distance(final([*gone, i]))
                evaluations += total - len(gone) - 1
            gone.append(min(scores, key=lambda i: (scores[i], i)))
            advance()
    return gone, evaluations


def quality(dense: Checkpoint, gone: list[int]) -> float:
    plan = PrunePlan("finercut", "", tuple(Drop(i) for i in sorted(gone)))
    runtime = Runtime(PrunedCheckpoint(dense, plan), CPU, dense.dtype)
    return perplexity(runtime, load_text("wikitext2-test"), 1024, 32).perplexity


@torch.inference_mode()
def measure(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    dense = open_checkpoint(path)
    windows = Calibrator(dense, "wikitext2", None, None, 0).windows(args.windows, args.seq_len).windows
    found: dict[str, tuple[list[int], int, float]] = {}
    for mode in ("fast", "exact"):
        start = time.process_time()
        ranking = search(
            dense, windows, CPU, dense.dtype, Goal(count=args.sublayers), DISTANCE, FRONT_PROTECTION, mode,  # type: ignore[arg-type]
            progress=Progress(True),
        )  # fmt: skip
        seconds = time.process_time() - start
        found[mode] = ([s.sublayer for s in ranking.steps], ranking.evaluations, seconds)
    start = time.process_time()
    decoder = Decoder(dense.spec, dense.tensor, CPU, dense.dtype)
    gone, evaluations = plain_loop(decoder, windows, args.sublayers)
    found["plain loop"] = (gone, evaluations, time.process_time() - start)
    ranked, plain_evaluations, plain_seconds = found["plain loop"]
    return [
        {
            "model": "SmolLM2-135M-Instruct bf16",
            "search": name,
            "sublayers": args.sublayers,
            "windows": f"{args.windows}x{args.seq_len}",
            "ranking": json.dumps(gone),
            "same_ranking_as_plain": gone == ranked,
            "evaluations": evaluations,
            "evaluations_of_plain": round(evaluations / plain_evaluations, 3),
            "cpu_s": round(seconds, 1),
            "cpu_s_of_plain": round(seconds / plain_seconds, 3),
            "perplexity": round(quality(dense, gone), 3),
            **environment(),
        }
        for name, (gone, evaluations, seconds) in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--sublayers", type=int, default=6)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.safetensors"
        import_model(args.weights, path)
        rows = measure(path, args)
    append_rows("finercut", rows)
    if args.json:
        print_json(rows)
        return
    for row in rows:
        print(
            f"{row['search']:<11} {row['cpu_s']:>8.1f} s = {row['cpu_s_of_plain']:.3f} of the plain loop, "
            f"{row['evaluations_of_plain']:.3f} of its evaluations, perplexity {row['perplexity']:.2f}"
        )


if __name__ == "__main__":
    main()
