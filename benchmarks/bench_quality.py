"""Quality of every method at several depths, with and without repair: one CSV row a configuration.

    python benchmarks/bench_quality.py WEIGHTS.gguf [--variants "shortgpt;flattengpt"] [--blocks 0,3,6]
        [--repairs none,ridge] [--seeds 0,1,2] [--calibration wikitext2] [--tasks piqa,... --limit 500]

FinerCut's search is kept between depths of one variant: the time of a row that finds its sub-layers there (largest
depth first) is that of the rest. Perplexity is WikiText-2 test as it stands, the first 32 windows of 1024 tokens;
zero-shot accuracy only with --tasks. Rows that are there already for this version of the code are not measured
again. Needs $DEPTHPRUNE_DATA (or the extra [data]). Every configuration runs in a process of its own, so that its
peak memory is its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, append_rows, environment, print_json

WINDOWS = 32
SEQ_LEN = 1024
# Variants: method and options by the name they have in the rows.
PAPER = {"grouping": "similarity", "selection": "importance"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "shortgpt": ("shortgpt", {}),
    "shortgpt, block influence": ("shortgpt", {"score": "block-influence"}),
    "finercut, fast": ("finercut", {"fast": True}),
    "finercut": ("finercut", {}),
    "flattengpt": ("flattengpt", {}),
    "flattengpt, pairs only": ("flattengpt", {"pairs_only": True}),
    # the ablation that the paper lacks: each adds to the one before it, `flattengpt` with ridge to the last
    "flattened, wide": ("flattengpt", {**PAPER, "keep_width": 1.0}),
    "flattened, heads narrowed": ("heads", PAPER),
    "flattened, heads and channels": ("flattengpt", {**PAPER, "compensate": False}),
    "flattengpt, paper's choices": ("flattengpt", PAPER),
}


def prune_heads(task: dict[str, Any], options: dict[str, Any]) -> Any:
    """FlattenGPT that narrows attention but leaves the merged FFNs wide: no option of `prune`, only an ablation."""
    import torch

    from depthprune_runtime.checkpoint import open_checkpoint, write_native
    from depthprune_runtime.pruning import prune as pipeline
    from depthprune_runtime.pruning.calibrator import Calibrator
    from depthprune_runtime.pruning.options import REPAIR_WINDOWS, FlattenGPTOptions
    from depthprune_runtime.pruning.rebuild import Narrowing, Rebuild

    chosen, cpu = FlattenGPTOptions(**options), torch.device("cpu")
    parent = open_checkpoint(task["dense"])
    calibrator = Calibrator(parent, task["calibration"], None, None, task["seed"])
    with torch.inference_mode():
        data = calibrator.windows(64, 512)
        plan = pipeline.plan_flattengpt(parent, task["blocks"], data, cpu, chosen)
        units = pipeline.kept_units(parent.spec, plan, 0.0)
        attention = {first: keep for first, keep in units.items() if first % 2 == 0}
        rebuild = Rebuild(parent, plan, Narrowing(attention, chosen), None, cpu)
        pruned, plan = rebuild.run(rebuild.walk(calibrator.windows(*REPAIR_WINDOWS).windows))
    write_native(Path(task["output"]), pruned, overwrite=True)
    return pipeline.PruneResult(Path(task["output"]), parent.spec, pruned.spec, plan)


def prune_variant(task: dict[str, Any]) -> Any:
    from depthprune_runtime import prune

    method, options = VARIANTS[task["variant"]]
    if method == "heads":
        return prune_heads(task, options)
    if method == "finercut":  # a ranking only grows: less depth is the head of a longer search
        options = {**options, "state_file": task["state"]}
    return prune(
        task["dense"],
        task["output"],
        method,  # type: ignore[arg-type]
        blocks=task["blocks"],
        repair=task["repair"],
        calibration=task["calibration"],
        seed=task["seed"],
        overwrite=True,
        **options,
    )


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: prune (or take the dense model) and score."""
    import resource

    from depthprune_runtime import Runtime, perplexity
    from depthprune_runtime.texts import load_text

    start = time.perf_counter()
    if task["blocks"]:
        result = prune_variant(task)
        parameters, sparsity = result.spec.num_parameters(), result.sparsity
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    runtime = Runtime.load(task["output"] if task["blocks"] else task["dense"])
    if not task["blocks"]:
        parameters, sparsity = runtime.spec.num_parameters(), 0.0
    found = perplexity(runtime, load_text("wikitext2-test"), SEQ_LEN, WINDOWS)
    return {
        "parameters": parameters,
        "sparsity": round(sparsity, 4),
        "perplexity": round(found.perplexity, 3),
        "prune_s": round(seconds, 1),
        "peak_mb": round(peak),
        "accuracy": json.dumps(accuracies(runtime, task)) if task["tasks"] else "",
    }


def accuracies(runtime: Any, task: dict[str, Any]) -> dict[str, float]:
    from depthprune_runtime.evaluation.tasks import evaluate, load_tasks

    results = evaluate(runtime, load_tasks(task["tasks"], task["limit"]))
    return {r.task: round(r.metrics["acc"].value, 4) for r in results}


def done(path: Path) -> set[tuple[str, ...]]:
    """Configurations that have a row."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[k] for k in KEY) for row in csv.DictReader(file)}


KEY = ("variant", "blocks_fewer", "repair", "calibration", "seed", "tasks", "commit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--variants", default="shortgpt;finercut, fast;flattengpt", help="separated by ;")
    parser.add_argument("--blocks", default="9,6,3,2,0")
    parser.add_argument("--repairs", default="none,ridge")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--tasks", default="", help="zero-shot tasks, separated by commas")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    from depthprune_runtime import import_model

    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        import_model(args.weights, dense)
        rows = [row for task in tasks(args) if (row := run(args, task, dense))]
    if args.json:
        print_json(rows)


def tasks(args: argparse.Namespace) -> list[dict[str, Any]]:
    wanted = []
    for blocks in [int(b) for b in args.blocks.split(",")]:
        for variant in args.variants.split(";") if blocks else ["dense"]:
            for repair in args.repairs.split(",") if blocks else ["none"]:
                for seed in [int(s) for s in args.seeds.split(",")] if blocks else [0]:
                    wanted.append({"variant": variant, "blocks": blocks, "repair": repair, "seed": seed})
    return wanted


def run(args: argparse.Namespace, task: dict[str, Any], dense: Path) -> dict[str, Any] | None:
    place = environment()
    labels = {
        "model": "SmolLM2-135M-Instruct bf16",
        "variant": task["variant"],
        "blocks_fewer": task["blocks"],
        "repair": task["repair"],
        "calibration": args.calibration,
        "seed": task["seed"],
        "tasks": args.tasks,
    }
    if tuple(str({**labels, **place}[k]) for k in KEY) in done(RESULTS / "quality.csv"):
        return None
    names = [t for t in args.tasks.split(",") if t]
    order = {**task, "calibration": args.calibration, "dense": str(dense), "tasks": names, "limit": args.limit}
    order["output"] = str(dense.with_name("pruned.safetensors"))
    order["state"] = str(dense.with_name(f"{task['variant']}-{args.calibration}-{task['seed']}.json"))
    done_process = subprocess.run(
        [sys.executable, __file__, str(args.weights), "--worker", json.dumps(order)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    row = {**labels, **json.loads(done_process.stdout.splitlines()[-1]), **place}
    append_rows("quality", [row])
    if not args.json:
        print(
            f"{task['variant']:<28} {task['blocks']:>2} fewer  repair {task['repair']:<6} seed {task['seed']}  "
            f"{row['parameters']:>12,}  perplexity {row['perplexity']:>8.2f}  {row['prune_s']:>6.0f} s  "
            f"{row['peak_mb']:>6} MB  {row['accuracy']}",
            flush=True,
        )
    return row


if __name__ == "__main__":
    main()
