"""Projections on the CPU: ops.linear and, in bf16, ops.panel_linear beside torch.nn.functional.linear, weights cold.

    python benchmarks/bench_linear.py [--models smollm2-135m llama-1b] [--dtypes bfloat16 ...] [--tokens 1 8 16 64]
                                      [--level avx2] [--onednn AVX512_CORE] [--rounds 9] [--threads N] [--json]
                                      [--record]

Every timing walks through copies of the weight that together exceed `COLD_BYTES`, so that each is read from memory,
never from a cache; x and the output stay warm. One round runs all candidates and a plain read (the sum of a buffer
of `COLD_BYTES`) in turn; `of_read` is the weights' bytes per second over that read's, median of the rounds. At many
tokens arithmetic decides, and the share of the bandwidth says little. --level holds our kernels to an instruction set,
--onednn (a value of ONEDNN_MAX_CPU_ISA) torch's: together they stand for a lesser processor.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import append_rows, environment, interleaved, paired_ratio, print_json, spread
from torch import Tensor

from depthprune_runtime import _C, ops
from depthprune_runtime.weights.panels import PanelWeight, panels_pay, to_panels

COLD_BYTES = 1 << 28  # at least four times the last-level cache of the machines measured so far
RUN_BYTES = 1 << 25  # weights read by one timing, so that the clock and the loop do not count
MODELS = {  # projection -> N, K
    "smollm2-135m": {
        "qkv": (960, 576),
        "o": (576, 576),
        "gate_up": (3072, 576),
        "down": (576, 1536),
        "lm_head": (49152, 576),
    },
    "llama-1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
}


def projections(
    function: Callable[[Tensor, Any], Tensor], x: Tensor, weights: Iterator[Any], calls: int
) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            function(x, next(weights))

    return run


def measure(
    args: argparse.Namespace, model: str, name: str, dtype: torch.dtype, buffer: Tensor
) -> list[dict[str, Any]]:
    """Rows of one projection: each number of tokens, all candidates."""
    n, k = MODELS[model][name]
    size = n * k * dtype.itemsize
    copies = [torch.randn(n, k).to(dtype) for _ in range(-(-COLD_BYTES // size))]
    calls = max(1, RUN_BYTES // size)
    weights = itertools.cycle(copies)  # shared: no candidate finds what the other has just read
    panels = [PanelWeight(to_panels(w), n, k) for w in copies] if dtype == torch.bfloat16 and panels_pay() else []
    packed = itertools.cycle(panels)
    rows = []
    for tokens in args.tokens:
        x = torch.randn(tokens, k).to(dtype)
        with torch.inference_mode():
            candidates = {
                "torch": projections(torch.nn.functional.linear, x, weights, calls),
                "ours": projections(ops.linear, x, weights, calls),
            }
            if panels:
                candidates["ours, panels"] = projections(ops.panel_linear, x, packed, calls)
            seconds = interleaved({**candidates, "read": buffer.sum}, args.rounds)
        read = buffer.nbytes / spread(seconds["read"])["median"]
        for candidate in candidates:
            each = [value / calls for value in seconds[candidate]]
            share = paired_ratio([value / buffer.nbytes for value in seconds["read"]], [v / size for v in each])
            rows.append(
                {
                    "model": model,
                    "projection": name,
                    "n": n,
                    "k": k,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": tokens,
                    "candidate": candidate,
                    "level": (args.onednn or "") if candidate == "torch" else _C.cpu_level(),
                    "rounds": args.rounds,
                    **{f"{key}_ms": round(1e3 * value, 5) for key, value in spread(each).items()},
                    "weights_gb_per_s": round(size / spread(each)["median"] / 1e9, 2),
                    "read_gb_per_s": round(read / 1e9, 2),
                    "of_read": round(share, 3),
                    "speedup_over_torch": round(paired_ratio(seconds["torch"], seconds[candidate]), 3),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--projections", nargs="+", help="names; all by default")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 64])
    parser.add_argument("--level", choices=_C.cpu_levels(), default=_C.cpu_levels()[-1])
    isas = ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16"]  # oneDNN takes no notice of other names
    parser.add_argument("--onednn", choices=isas, help="most that torch's products may use")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/linear_cpu.csv")
    args = parser.parse_args()
    if args.onednn:
        os.environ["ONEDNN_MAX_CPU_ISA"] = args.onednn  # read at its first product
    torch.set_num_threads(args.threads)
    _C.set_cpu_level(args.level)
    place = environment()
    buffer = torch.ones(COLD_BYTES // 4)
    rows = []
    for model in args.models:
        for name in args.projections or MODELS[model]:
            for dtype in args.dtypes:
                found = measure(args, model, name, getattr(torch, dtype), buffer)
                rows += [{**row, **place} for row in found]
                if not args.json:
                    print("\n".join(line(row) for row in found), flush=True)
    if args.record:
        append_rows("linear_cpu", rows)
    if args.json:
        print_json(rows)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:<13}{row['projection']:<8}{row['dtype']:<9}T={row['tokens']:<4}{row['candidate']:<13}"
        f"{row['median_ms']:>9.3f} ms [{row['q1_ms']:.3f} .. {row['q3_ms']:.3f}] {row['weights_gb_per_s']:>6.1f} GB/s "
        f"{100 * row['of_read']:>4.0f}% of {row['read_gb_per_s']:.1f} {row['speedup_over_torch']:>6.2f}x torch"
    )


if __name__ == "__main__":
    main()
