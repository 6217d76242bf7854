"""Where the time of a decode step on the CPU goes: whole specs beside the same without a kind of sub-layer.

    python benchmarks/bench_profile.py [--models smollm2-135m] [--precisions bf16 int8 int4] [--contexts 32 1024]
                                       [--rounds 15] [--threads N] [--json] [--no-record]

Shapes with random weights, as dense and as `shortgpt 25%` (blocks dropped) leave them, batch 1, the step alone: no
scheduler, no sampler. Each round times in turn the whole step, the one without attentions, the one without FFNs, and
the one with neither; attention is what its absence saves, FFN likewise, and `ends` (embedding, last norm, head) is what
the last one takes. The three need not add up to the whole: caches are shared. Rows go to results/profile_cpu.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import append_rows, environment, interleaved, print_json, spread
from public_models import SPECS, shortened
from random_decode_step import decode_step, random_weights

from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.weights.quantized import QuantSpec

PRECISIONS = {"bf16": None, "int8": QuantSpec(8, 64), "int4": QuantSpec(4, 32)}
WITHOUT = {"whole": (), "attention": ("attention",), "ffn": ("ffn",), "ends": ("attention", "ffn")}
STEPS = 4  # of one timing


def without(spec: DecoderSpec, kinds: tuple[str, ...]) -> DecoderSpec:
    attentions, ffns = len(spec.attention_sublayers()), len(spec.ffn_sublayers())
    return shortened(spec, 0, attentions if "attention" in kinds else 0, ffns if "ffn" in kinds else 0)


def repeated(step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def profile(spec: DecoderSpec, precision: str, context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step of the whole and of its parts, with quartiles over the rounds."""
    runs = {}
    for part, kinds in WITHOUT.items():
        less = without(spec, kinds)
        runs[part] = repeated(decode_step(less, random_weights(less, PRECISIONS[precision]), context=context))
    seconds = {part: [1e3 * s / STEPS for s in taken] for part, taken in interleaved(runs, rounds, warmup=3).items()}
    parts = {"whole": seconds["whole"], "ends": seconds["ends"]}
    for part in ("attention", "ffn"):
        parts[part] = [a - b for a, b in zip(seconds["whole"], seconds[part], strict=True)]
    return {part: spread(values) for part, values in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SPECS), default=["smollm2-135m"])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[32, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="do not append to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    place = environment()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        dense = SPECS[model]
        for variant, blocks in (("dense", 0), ("shortgpt 25%", len(dense.ffn_sublayers()) // 3)):
            for precision in args.precisions:
                for context in args.contexts:
                    found = profile(shortened(dense, blocks), precision, context, args.rounds)
                    head = {"model": model, "variant": variant, "precision": precision, "context": context}
                    new = [
                        head | {"part": part, "rounds": args.rounds} | {f"{k}_ms": round(v, 4) for k, v in s.items()}
                        for part, s in found.items()
                    ]
                    rows += [{**row, **place} for row in new]
                    if not args.no_record:
                        append_rows("profile_cpu", rows[-len(new) :])
                    if not args.json:
                        texts = [f"{r['part']} {r['median_ms']} [{r['q1_ms']} .. {r['q3_ms']}] ms" for r in new]
                        print(*head.values(), " ".join(texts), flush=True)
    if args.json:
        print_json(rows)


if __name__ == "__main__":
    main()
