"""Our runtime, dense and pruned, beside other runtimes on the CPU: decode, prefill, load and memory.

    python benchmarks/bench_cpu.py SMOLLM2.gguf [--models smollm2-135m random-llama-1b] [--precisions bf16 int8 int4]
                                   [--runtimes ours llama.cpp ...] [--rounds 3] [--quick] [--json] [--no-record]

Each runtime runs in a process and, the peers, in a virtual environment of its own (`make peers`). All models of one
precision stay loaded; a round has up to three turns of each generation, the shorter the more, and in a turn one process
after the other does it while the rest wait without using the CPU (how much they used is measured and printed).
Everybody decodes greedily, the same prompts of token ids, the same number of tokens; prompts differ from turn to turn,
and no prefix cache is on. Before each turn the machine's limits are measured: reading a large buffer, reading one of
the model's size, a bf16 matrix product. Ratios and shares compare what stands in one turn; `rounds` counts turns.

decode1@N: tokens a second after the first, batch 1, N tokens of prompt; decode8: of 8 prompts of 32 together;
prefill512: prompt tokens a second up to the first token, whose time is `ttft512`. load_s: from the path to a model
ready for requests, files in the page cache, runtime imported; vLLM's has its compilation in it.
rss_mb: resident memory after a generation of 16 tokens at batch 1, `rss_baseline_mb`: before loading the model.
gain_of_bytes: a pruned model's speedup over ours dense as a share of the ratio of bytes that a token reads.
same_tokens: how many of the first 16 greedy tokens are those of ours, dense, in the same precision.
Models that do not fit in memory together are measured in two groups, `ours` dense in both, which links the ratios.

Rows are appended after each model and precision, so `--models` and `--precisions` resume a run that was stopped. The
files of all runtimes would take about 3 GB for SmolLM2 and 30 GB for the random model; with `--discard` each
precision's go before the next, which leaves about half of that at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from common import append_rows, environment, print_json
from peers.measure import CASES, run_group, skipped, split_groups
from peers.rows import Ratios, rows_of
from peers.runtimes import PRECISIONS, RUNTIMES, Candidate, Files, SkippedError
from peers.weights import MODELS, VARIANTS, Model

MOST_TOKENS = 192  # so that every case fits the contexts that the workers make


def candidates(files: Files, precision: str, args: argparse.Namespace) -> list[Candidate]:
    """Those that can take part; the others are named with the reason."""
    found = []
    for runtime in args.runtimes:
        if precision not in RUNTIMES[runtime][2]:
            continue
        for variant in args.variants if runtime == "ours" else ("dense",):
            try:
                found.append(files.candidate(runtime, variant, precision))
            except SkippedError as reason:
                skipped(f"{runtime} {variant} {precision}", str(reason))
    return found


def run_precision(files: Files, model: Model, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model and precision."""
    found = candidates(files, precision, args)
    tokens = args.tokens or model.tokens
    ratios = Ratios()
    recorded: set[str] = set()
    rows: list[dict[str, Any]] = []
    reference: list[int] = []
    for group in split_groups(found):
        measured, machine = run_group(group, files, tokens, precision, args)
        ratios.see(measured)
        new = [m for m in measured if m.candidate.label not in recorded]
        recorded |= {m.candidate.label for m in new}
        reference = reference or next((m.check for m in measured if m.candidate.label == "ours"), [])
        head = {"model": model.name, "precision": precision}
        rows += rows_of(measured, new, machine, ratios, head, tokens, reference)
    place = {**environment(), "threads": str(args.threads)}
    return [{**row, **place} for row in rows]


def line(row: dict[str, Any]) -> str:
    name = f"{row['runtime']} {row['variant']}".strip()
    share = f"{100 * float(row['of_limit']):4.0f}% of read" if row["of_limit"] else " " * 13
    ratio = f"{float(row['ratio_to_best_peer']):6.2f}x {row['best_peer']}" if row["ratio_to_best_peer"] else ""
    ratio += f"  {float(row['gain_of_bytes']):.2f} of what bytes promise" if row["gain_of_bytes"] else ""
    return (
        f"{row['model']:<16}{row['precision']:<6}{name:<22}{row['what']:<16}{row['median']:>10.4g} {row['unit']:<9}"
        f"[{row['q1']:.4g} .. {row['q3']:.4g}]  {share}  {row['same_tokens']:<6}{ratio}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="?", help="SmolLM2 as GGUF; the random model needs none")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="of ours")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="new ones of a decode run; each model has its default")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("DEPTHPRUNE_PEERS", ".cache/peers")))
    parser.add_argument("--work", type=Path, default=Path(".cache/bench_cpu"), help="for the models of all runtimes")
    parser.add_argument("--discard", action="store_true", help="delete the files of a precision once it is measured")
    parser.add_argument("--quick", action="store_true", help="SmolLM2, one round, few tokens; nothing is recorded")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="do not append to benchmarks/results")
    parser.add_argument("--results", default="cpu", metavar="NAME", help="append to NAME.csv (default: %(default)s)")
    args = parser.parse_args()
    if args.quick:
        args.models, args.rounds, args.tokens, args.no_record = ["smollm2-135m"], 1, args.tokens or 4, True
    if args.tokens is not None and not 2 <= args.tokens <= MOST_TOKENS:
        parser.error(f"--tokens: expected 2 to {MOST_TOKENS}")
    if "smollm2-135m" in args.models and args.weights is None:
        parser.error("smollm2-135m needs its GGUF file")
    return args


def main() -> None:
    args = arguments()
    rows = []
    for name in args.models:
        model = MODELS[name]
        files = Files(model, args.work, args.weights, args.peers)
        for precision in args.precisions:
            found = run_precision(files, model, precision, args)
            rows += found
            if args.discard:
                files.discard()
            if found and not args.no_record:  # at once: a run that is stopped keeps what it has
                append_rows(args.results, found)
            if not args.json:
                print("\n".join(line(row) for row in found), flush=True)
    if args.json:
        print_json(rows)
    if not rows:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
