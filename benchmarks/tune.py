"""Tune one number of a method on rows that are not reported: one CSV row a value.

    python benchmarks/tune.py WEIGHTS.gguf strength --method finercut --fast --blocks 3,6,9 --values 0,0.4,0.6,0.8,1
    python benchmarks/tune.py WEIGHTS.gguf repair-lam --method shortgpt --blocks 6 --values 0.01,0.05,0.1,0.5
    python benchmarks/tune.py WEIGHTS.gguf repair-samples --method shortgpt --blocks 6 --values 32,64,128
    python benchmarks/tune.py WEIGHTS.gguf leverage-lam --method flattengpt --blocks 3 --values 0.01,0.1,1,10,100

Measured are the perplexity of WikiText-2 valid as it stands (the first 32 windows of 1024 tokens) and, for each of
--tasks, zero-shot accuracy on --limit rows from row --offset on (500..999: benchmarks report the first 500).

strength: the model is pruned once with the whole repair; every value is a blend W0 + value (W - W0) of its weights
with those that the same plan leaves without repair. repair-lam: ridge of the repair; repair-samples: windows of its
walk; leverage-lam: ridge of FlattenGPT's channel scores and compensation, as printed, without repair. These prune
anew for each value; FinerCut's search is kept within a run. Rows that are there already for this version of the code
are not measured again. Needs $DEPTHPRUNE_DATA.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, append_rows, environment, print_json
from torch import Tensor

from depthprune_runtime import InputError, Runtime, import_model, perplexity, prune
from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.evaluation.task_files import find_task, load_task
from depthprune_runtime.evaluation.tasks import evaluate_task
from depthprune_runtime.fitting.options import RepairOptions
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.method import method_options
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.texts import load_text

WINDOWS = 32
SEQ_LEN = 1024
KNOBS = ("strength", "repair-lam", "repair-samples", "leverage-lam")
KEY = ("method", "blocks_fewer", "calibration", "seed", "knob", "value", "tasks", "rows", "commit")


class Blend(Checkpoint):
    """`start` with the share `strength` of what `end`, of the same spec, changes in it."""

    def __init__(self, start: Checkpoint, end: Checkpoint, strength: float) -> None:
        self.name, self.spec, self.dtype = f"{end.name} at {strength}", end.spec, end.dtype
        self.provenance, self.plan = end.provenance, end.plan
        self._start, self._end, self._strength = start, end, strength

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._end.assets

    def tensor(self, name: str) -> Tensor:
        start, end = self._start.tensor(name), self._end.tensor(name)
        return (
            start
            if torch.equal(start, end)
            else torch.lerp(start.double(), end.double(), self._strength).to(self.dtype)
        )


def quality(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Columns of what is measured of one model."""
    runtime = Runtime(checkpoint, torch.device("cpu"), checkpoint.dtype)
    found: dict[str, Any] = {
        "perplexity_valid": round(perplexity(runtime, load_text("wikitext2-valid"), SEQ_LEN, WINDOWS).perplexity, 3)
    }
    accuracy = {
        name: accuracies(runtime, name, args.offset, args.limit) for name in filter(None, args.tasks.split(","))
    }
    papers = [a.get("acc_norm", a["acc"]) for a in accuracy.values()]
    return {
        **found,
        "accuracy": json.dumps(accuracy) if accuracy else "",
        "mean_acc": round(sum(a["acc"] for a in accuracy.values()) / len(accuracy), 4) if accuracy else "",
        "mean_acc_norm": round(sum(papers) / len(papers), 4) if papers else "",  # acc where there is no acc_norm
    }


def accuracies(runtime: Runtime, name: str, offset: int, limit: int) -> dict[str, float]:
    path = find_task(name)
    if path is None:
        raise InputError(f"task {name}: expected a .jsonl file or one in the folder $DEPTHPRUNE_DATA, got neither")
    result = evaluate_task(runtime, load_task(path, limit, offset), progress=Progress(True))
    return {
        metric: round(result.metrics[metric].value, 4) for metric in ("acc", "acc_norm") if metric in result.metrics
    }


def pruned(args: argparse.Namespace, folder: Path, blocks: int, value: float) -> Checkpoint:
    """The model at `value` of a ridge, or for `strength` the one that is wholly repaired."""
    values: dict[str, Any] = {}
    if args.method == "finercut":
        values = {"fast": args.fast, "state_file": str(folder / "search.json")}
    repair: Any
    if args.knob == "leverage-lam":
        repair = "none"
        values["leverage_lam"] = value
    elif args.knob == "strength":
        repair = RepairOptions(strength=1.0)
    else:
        repair = RepairOptions(lam=value) if args.knob == "repair-lam" else RepairOptions(samples=int(value))
    path = folder / "pruned.safetensors"
    prune(
        folder / "dense.safetensors", path, blocks=blocks, options=method_options(args.method, values), repair=repair,
        calibration=args.calibration, seed=args.seed, progress=Progress(True),
    )  # fmt: skip
    return open_checkpoint(path)


def models(
    args: argparse.Namespace, folder: Path, blocks: int, values: list[float]
) -> Iterator[tuple[float, Checkpoint]]:
    if args.knob != "strength":
        for value in values:
            yield value, pruned(args, folder, blocks, value)
        return
    repaired = pruned(args, folder, blocks, 1.0)
    assert repaired.plan is not None
    start = PrunedCheckpoint(open_checkpoint(folder / "dense.safetensors"), PrunePlan.from_json(dict(repaired.plan)))
    for value in values:
        yield value, Blend(start, repaired, value)


def labels(args: argparse.Namespace, blocks: int, value: float) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct bf16",
        "method": args.method + (", fast" if args.fast else ""),
        "blocks_fewer": blocks,
        "calibration": args.calibration,
        "seed": args.seed,
        "knob": args.knob,
        "value": value,
        "tasks": args.tasks,
        "rows": f"{args.offset}..{args.offset + args.limit - 1}" if args.tasks else "",
    }


def done() -> set[tuple[str, ...]]:
    path = RESULTS / "tuning.csv"
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[k] for k in KEY) for row in csv.DictReader(file)}


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    place = environment()
    for blocks in [int(b) for b in args.blocks.split(",")]:
        every = {float(v): {**labels(args, blocks, float(v)), **place} for v in args.values.split(",")}
        wanted = [v for v, row in every.items() if tuple(str(row[k]) for k in KEY) not in done()]
        for value, checkpoint in models(args, folder, blocks, wanted) if wanted else ():
            row = {**labels(args, blocks, value), **quality(checkpoint, args), **place}
            append_rows("tuning", [row])
            rows.append(row)
            print(
                f"{row['method']:<16} {blocks:>2} fewer  {args.knob} {value:<6g} valid perplexity "
                f"{row['perplexity_valid']:>9.3f}  mean acc {row['mean_acc']}  acc_norm {row['mean_acc_norm']}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("knob", choices=KNOBS)
    parser.add_argument("--method", choices=("shortgpt", "finercut", "flattengpt"), required=True)
    parser.add_argument("--fast", action="store_true", help="finercut: the fast search")
    parser.add_argument("--blocks", default="3,6,9")
    parser.add_argument("--values", required=True, help="separated by commas")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tasks", default="piqa,hellaswag,arc_easy,winogrande", help="separated by commas; '' for none"
    )
    parser.add_argument("--offset", type=int, default=500, help="first row of each task (default 500)")
    parser.add_argument("--limit", type=int, default=500, help="rows of each task (default 500)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.fast and args.method != "finercut":
        parser.error("--fast: only finercut has a fast search")
    if args.knob == "leverage-lam" and args.method != "flattengpt":
        parser.error("leverage-lam: only flattengpt has one")
    with tempfile.TemporaryDirectory() as folder:
        import_model(args.weights, Path(folder) / "dense.safetensors")
        rows = measure(args, Path(folder))
    if args.json:
        print_json(rows)


if __name__ == "__main__":
    main()
