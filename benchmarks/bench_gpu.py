"""Kernels and whole models on one GPU, beside torch and Transformers in the same run.

    python benchmarks/bench_gpu.py [--models llama-2-7b ...] [--variants dense "shortgpt 25%" ...] [--cases ...]
                                   [--rounds 20] [--minutes 60] [--quick] [--json] [--output FILE.csv | --no-record]

One H100, H200 or A100 with 80 GB holds every model; nothing is downloaded: weights are random, made on the GPU, in
bf16. Rows are appended to benchmarks/results/gpu.csv as they come, so that `--minutes`, or a stop, keeps them.

machine: bandwidth of a copy (bytes read and written) and of a read, rate of a large bf16 product.
Kernels: device time of one call by CUDA events, L2 emptied before each; `of_limit` is the fewest bytes over the better
bandwidth, or the operations over the product's rate, divided by that time; `ratio` is the peer's time over ours, round
by round. `settings` says whether a kernel of ours ran (native) or plain torch (reference).
decode1, decode8, decode64: tokens a second of 1, 8 and 64 prompts of `--prompt` tokens together, greedy, after the
first eight; `bytes` are those of a decode step: each weight once, and the keys and values of the mean context.
prefill2048: prompt tokens a second until the host has the first new token.
`ratio` is to ours, dense, in the same rounds. Pruned variants have the shapes that the methods leave.

`--quick`: one model, few rounds; `--device cpu --quick`: the same code on a tiny model, which measures nothing.
Neither writes rows unless `--output` is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, append_rows, environment, paired_ratio, print_json, spread
from on_gpu import decode_kernels, kernels
from on_gpu.generation import DENSE, PEERS, Case, Generation, release
from on_gpu.models import SPECS, make_pool
from on_gpu.timing import Budget, Clock
from peers.weights import VARIANTS
from public_models import decode_bytes, prefill_flops

from depthprune_runtime.ops import implementations

GENERATION = {"decode1": 1, "decode8": 8, "decode64": 64, "prefill2048": 1}  # prompts together
KERNELS = (*kernels.OPS, *decode_kernels.OPS)
CASES = (*KERNELS, *GENERATION)
MODELS = ("llama-2-7b", "llama-2-13b", "llama-3-8b")
MORE_MODELS = ("llama-2-70b/4",)  # only by name
Row = dict[str, Any]
Limits = dict[str, float]  # bytes a second, operations a second


def _row(model: str, runtime: str, case: str, unit: str, samples: Sequence[float], **more: Any) -> Row:
    stats = {key: float(f"{value:.5g}") for key, value in spread(samples).items()}
    row: Row = {"model": model, "runtime": runtime, "case": case, "rounds": len(samples), **stats, "unit": unit}
    row |= dict.fromkeys(("bytes", "flops", "limit", "of_limit", "ratio", "ratio_to", "settings"), "")
    unknown = set(more) - set(row)
    assert not unknown, unknown
    return row | more


def generation_case(name: str, tokens: int, tiny: bool, prompt: int = 128) -> Case:
    batch = GENERATION[name]
    if name.startswith("prefill"):
        return Case(name, batch, 64 if tiny else 2048, 1)
    return Case(name, batch, 8 if tiny else prompt, tokens, skip=min(8, tokens // 2))


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.tiny = args.device == "cpu"
        self.budget = Budget(args.minutes)
        self.clock = Clock(self.device, self.budget)
        self.limits: Limits = {}

    def rows(self) -> Iterator[list[Row]]:
        """Rows as they are measured."""
        yield self._machine()
        for model in self.args.models:
            for op in [c for c in self.args.cases if c in KERNELS]:
                if self._stopped(f"{model} {op}"):
                    continue
                yield self._kernel_rows(model, op)
            cases = [c for c in self.args.cases if c in GENERATION]
            if cases and not self._stopped(f"{model} {' '.join(cases)}"):
                yield from self._generation_rows(model, cases)

    def _stopped(self, what: str) -> bool:
        if self.budget.spent:
            print(f"skipped: {what}: the {self.args.minutes:g} minutes are over", file=sys.stderr, flush=True)
        return self.budget.spent

    def _machine(self) -> list[Row]:
        calls = kernels.machine(self.device, self.args.quick)
        seconds = self.clock.rounds({name: run for name, (run, _) in calls.items()}, self.args.rounds)
        rates = {name: [amount / s for s in seconds[name]] for name, (_, amount) in calls.items()}
        median = {name: spread(values)["median"] for name, values in rates.items()}
        self.limits = {"bandwidth": max(median["copy"], median["read"]), "matmul": median["matmul_bf16"]}
        units = {"copy": "GB/s", "read": "GB/s", "matmul_bf16": "GFLOP/s"}
        return [_row("", "machine", name, units[name], [v / 1e9 for v in values]) for name, values in rates.items()]

    def _kernel_rows(self, model: str, op: str) -> list[Row]:
        sizes = kernels.Sizes(64, (32,), (1, 8)) if self.tiny else kernels.Sizes()
        dtype = torch.bfloat16
        found: list[Row] = []
        settings = implementations(op)["CPU" if self.tiny else "CUDA"]
        for make in decode_kernels.Shapes(SPECS[model], sizes, self.device, dtype).of(op):
            if found and self._stopped(f"the rest of {model} {op}"):
                break
            try:
                kernel = make()
                seconds = self.clock.rounds({"ours": kernel.ours, kernel.peer_name: kernel.peer}, self.args.rounds)
            except torch.OutOfMemoryError as error:
                print(f"skipped: {model} {op}: {error}", file=sys.stderr, flush=True)
                release(self.device)
                continue
            floor = self._floor_s(kernel)
            for runtime, values in seconds.items():
                own = {} if runtime != "ours" else {"settings": settings, "ratio_to": kernel.peer_name}
                if own:
                    own["ratio"] = f"{paired_ratio(seconds[kernel.peer_name], values):.3f}"
                micro = [1e6 * v for v in values]
                share = f"{floor / spread(values)['median']:.4g}"
                more = {"bytes": kernel.nbytes, "flops": kernel.flops or "", "limit": kernel.limit, "of_limit": share}
                found.append(_row(model, runtime, f"{op} {kernel.shape}", "us", micro, **more, **own))
            del kernel
            release(self.device)
        return found

    def _floor_s(self, kernel: kernels.Kernel) -> float:
        amount = kernel.nbytes if kernel.limit == "bandwidth" else kernel.flops
        return amount / self.limits[kernel.limit]

    def _generation_rows(self, model: str, names: Sequence[str]) -> Iterator[list[Row]]:
        variants = tuple(v for v in self.args.variants if v != "dense")
        peers = () if self.args.no_peers else PEERS
        pool, runs = None, None
        for name in names:
            if self._stopped(f"{model} {name}"):
                continue
            case = generation_case(name, self.args.tokens, self.tiny, self.args.prompt)
            try:
                if runs is None:
                    pool = make_pool(model, variants, self.device, torch.bfloat16)
                    runs = Generation(model, pool, variants, peers, self.budget)
                groups = runs.measure(case, self.args.generation_rounds, self.clock)
            except torch.OutOfMemoryError as error:
                print(f"skipped: {model} {name}: {error}", file=sys.stderr, flush=True)
                release(self.device)
                continue
            yield [row for i, group in enumerate(groups) for row in self._case_rows(model, runs, case, group, i)]
        del runs, pool
        release(self.device)

    def _case_rows(
        self, model: str, runs: Generation, case: Case, rates: dict[str, list[float]], group: int
    ) -> Iterator[Row]:
        for name, values in rates.items():
            spec = runs.spec(name)
            more: Row = {"settings": f"{case.batch} x {case.prompt} + {case.tokens} tokens, group {group}"}
            if case.decode:
                more["bytes"] = round(decode_bytes(spec, case.batch, case.mean_context))
                more["limit"], amount = "bandwidth", more["bytes"] / case.batch
            else:
                more["flops"] = round(prefill_flops(spec, case.prompt))
                more["limit"], amount = "matmul", more["flops"] / case.prompt
            more["of_limit"] = f"{spread(values)['median'] * amount / self.limits[more['limit']]:.4g}"
            if name != DENSE:
                more["ratio"], more["ratio_to"] = f"{paired_ratio(values, rates[DENSE]):.3f}", DENSE
            yield _row(model, name, case.name, "tokens/s", values, **more)


def line(row: Row) -> str:
    share = f"{100 * float(row['of_limit']):5.1f}% of {row['limit']}" if row["of_limit"] else ""
    ratio = f"{float(row['ratio']):6.2f}x {row['ratio_to']}" if row["ratio"] else ""
    return (
        f"{row['model']:<12}{row['case']:<44}{row['runtime']:<31}{row['median']:>10.4g} {row['unit']:<9}"
        f"[{row['q1']:.4g} .. {row['q3']:.4g}]  {share:<22}{ratio}"
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *MORE_MODELS), default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="dense always runs")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20, help="of kernels; whole models run a quarter of them")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of a decode run")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt of a decode run")
    parser.add_argument("--minutes", type=float, help="begin nothing new after them; what is measured is kept")
    parser.add_argument("--no-peers", action="store_true", help="without Transformers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, help="append rows to this file")
    parser.add_argument("--no-record", action="store_true", help="do not append to benchmarks/results")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: a dry run that measures nothing; add --quick")
    if args.rounds < 1 or args.tokens < 4 or args.prompt < 1:
        parser.error("expected --rounds and --prompt of at least 1 and --tokens of at least 4")
    if args.minutes is not None and args.minutes < 0:
        parser.error("--minutes: expected a number of at least 0")
    if args.output is not None and args.output.suffix != ".csv":
        parser.error(f"--output: expected a file that ends in .csv, got {args.output}")
    if args.quick:
        args.models, args.rounds = ["tiny"] if args.device == "cpu" else args.models[:1], min(args.rounds, 3)
    if args.output is None and not args.quick and not args.no_record:
        args.output = RESULTS / "gpu.csv"
    args.generation_rounds = max(1, args.rounds // 4)
    return args


def main() -> None:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu: no CUDA device here; `--device cpu --quick` only tries the code")
    place = environment()
    rows: list[Row] = []
    for measured in Bench(args).rows():
        found = [{**row, **place} for row in measured]
        rows += found
        if args.output is not None and found:  # at once: a run that is stopped keeps what it has
            append_rows(args.output.stem, found, args.output.parent)
        if not args.json:
            print("\n".join(map(line, found)), flush=True)
    if args.json:
        print_json(rows)


if __name__ == "__main__":
    main()
