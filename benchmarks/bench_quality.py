"""Quality of every method at several depths, with and without repair: one CSV row a configuration.

    python benchmarks/bench_quality.py WEIGHTS.gguf [--variants "shortgpt;flattengpt"] [--blocks 0,3,6]
        [--repairs none,ridge] [--seeds 0,1,2] [--calibration wikitext2] [--tasks piqa,... --limit 500 --offset 0]
        [--work FOLDER]

FinerCut's search is kept between depths of one variant: the time of a row that finds its sub-layers there (largest
depth first) is that of the rest. Perplexity is WikiText-2 test as it stands, the first 32 windows of 1024 tokens.
Zero-shot tasks are scored on their first 500 rows (--tasks "" leaves them out); rows after them are there to tune
on (--offset 500). Which rows were right goes to quality_rows.csv. Rows that are there already for this version of
the code are not measured again: what was interrupted can be run again. --work keeps the pruned files and searches,
so that other tasks or rows of the same configuration need no pruning. Needs $DEPTHPRUNE_DATA (or the extra [data]).
Every configuration runs in a process of its own, so that its peak memory is its own. Its threads sleep while they wait
(OMP_WAIT_POLICY, unless it is set): beside other work, waiting awake takes several times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import zero_shot
from common import append_rows, environment, is_clean, print_json, recorded_rows

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
    from depthprune_runtime.fitting.calibrator import Calibrator
    from depthprune_runtime.fitting.options import REPAIR_WINDOWS
    from depthprune_runtime.pruning.flattengpt.grouping import plan_flattengpt
    from depthprune_runtime.pruning.flattengpt.options import FlattenGPTOptions
    from depthprune_runtime.pruning.flattengpt.units import kept_units
    from depthprune_runtime.pruning.rebuild import Narrowing, Rebuild
    from depthprune_runtime.pruning.result import PruneResult
    from depthprune_runtime.spec import AttentionSpec

    chosen, cpu = FlattenGPTOptions(**options), torch.device("cpu")
    parent = open_checkpoint(task["dense"])
    calibrator = Calibrator(parent, task["calibration"], None, None, task["seed"])
    with torch.inference_mode():
        data = calibrator.windows(64, 512)
        plan = plan_flattengpt(parent, task["blocks"], data, cpu, chosen)
        units = kept_units(parent.spec, plan, 0.0)
        attention = {
            first: keep for first, keep in units.items() if isinstance(parent.spec.sublayers[first], AttentionSpec)
        }
        after_repair = chosen.selection == "after-repair"
        narrowing = Narrowing(attention, after_repair, chosen.compensate, chosen.leverage_lam)
        rebuild = Rebuild(parent, plan, narrowing, None, cpu)
        pruned, plan = rebuild.run(rebuild.walk(calibrator.windows(*REPAIR_WINDOWS).windows))
    write_native(Path(task["output"]), pruned, overwrite=True)
    before, after = parent.spec.num_parameters(), pruned.spec.num_parameters()
    return PruneResult(Path(task["output"]), plan, before, after, parent.spec, pruned.spec)


def prune_variant(task: dict[str, Any]) -> Any:
    from depthprune_runtime import prune
    from depthprune_runtime.pruning.method import method_options

    method, options = VARIANTS[task["variant"]]
    if method == "heads":
        return prune_heads(task, options)
    if method == "finercut":  # a ranking only grows: less depth is the head of a longer search
        options = {**options, "state_file": task["state"]}
    return prune(
        task["dense"],
        task["output"],
        blocks=task["blocks"],
        options=method_options(method, options),
        repair=task["repair"],
        calibration=task["calibration"],
        seed=task["seed"],
        overwrite=True,
    )


def pruned(task: dict[str, Any]) -> dict[str, Any]:
    """Prune, unless it was done before; what it cost and what is left."""
    import resource

    done = Path(task["output"]).with_suffix(".json")
    if done.exists():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    start = time.perf_counter()
    result = prune_variant(task)
    found = {
        "parameters": result.parameters,
        "sparsity": round(result.sparsity, 4),
        "prune_s": round(time.perf_counter() - start, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    done.write_text(json.dumps(found))
    return found


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: prune (or take the dense model) and score."""
    from depthprune_runtime import Runtime, perplexity
    from depthprune_runtime.evaluation.tasks import evaluate, load_tasks
    from depthprune_runtime.texts import load_text

    cost = pruned(task) if task["blocks"] else {"prune_s": 0.0, "peak_mb": 0, "sparsity": 0.0}
    runtime = Runtime.load(task["output"] if task["blocks"] else task["dense"])
    found = perplexity(runtime, load_text("wikitext2-test"), SEQ_LEN, WINDOWS)
    start = time.perf_counter()
    results = evaluate(runtime, load_tasks(task["tasks"], task["limit"], task["offset"])) if task["tasks"] else []
    return {
        **cost,
        "parameters": runtime.spec.num_parameters(),
        "perplexity": round(found.perplexity, 3),
        "zero_shot_s": round(time.perf_counter() - start, 1),
        "results": zero_shot.to_json(results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--variants", default="shortgpt;finercut, fast;flattengpt", help="separated by ;")
    parser.add_argument("--blocks", default="9,6,3,2,0")
    parser.add_argument("--repairs", default="none,ridge")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--tasks", default=",".join(zero_shot.TASKS), help="zero-shot tasks, separated by commas")
    parser.add_argument("--limit", type=int, default=zero_shot.LIMIT)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder that keeps pruned files")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    from depthprune_runtime import import_model

    commit = environment()["commit"]
    args.keep = args.work is not None and is_clean(commit)  # of another state of the tree, nothing is used again
    with contextlib.ExitStack() as stack:
        work = args.work if args.keep else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        wanted = [task for task in tasks(args) if not known(args, task)]
        dense = work / f"dense-{args.weights.stem}-{commit}.safetensors"
        if wanted and not dense.exists():
            import_model(args.weights, dense)
        rows = [run(args, task, dense) for task in wanted]
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


def task_names(args: argparse.Namespace) -> list[str]:
    return [t for t in args.tasks.split(",") if t]


def labels_of(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct bf16",
        "variant": task["variant"],
        "blocks_fewer": task["blocks"],
        "repair": task["repair"],
        "calibration": args.calibration,
        "seed": task["seed"],
        "tasks": zero_shot.label(task_names(args), args.limit, args.offset),
    }


def known(args: argparse.Namespace, task: dict[str, Any]) -> bool:
    """Whether the configuration has a row of this commit."""
    labels = {**labels_of(args, task), **environment()}
    key = tuple(str(labels[k]) for k in zero_shot.KEY)
    return key in {tuple(row[k] for k in zero_shot.KEY) for row in recorded_rows("quality")}


def run(args: argparse.Namespace, task: dict[str, Any], dense: Path) -> dict[str, Any]:
    place = environment()
    labels = labels_of(args, task)
    order = {**task, "calibration": args.calibration, "dense": str(dense), "tasks": task_names(args)}
    order |= {"limit": args.limit, "offset": args.offset}
    output = dense.with_name(file_name(labels, place["commit"]) + ".safetensors")
    order["output"] = str(output)
    order["state"] = str(dense.with_name(file_name({**labels, "blocks_fewer": "", "repair": ""}, place["commit"])))
    done_process = subprocess.run(
        [sys.executable, __file__, str(args.weights), "--worker", json.dumps(order)],
        stdout=subprocess.PIPE, text=True, check=True, env={"OMP_WAIT_POLICY": "passive", **os.environ},
    )  # fmt: skip
    found = json.loads(done_process.stdout.splitlines()[-1])
    if not args.keep:
        output.unlink(missing_ok=True)
        output.with_suffix(".json").unlink(missing_ok=True)
    results = zero_shot.from_json(found["results"])
    columns = ("parameters", "sparsity", "perplexity", "prune_s", "peak_mb")
    row = {**labels, **{name: found[name] for name in columns}}
    row |= {"accuracy": json.dumps(zero_shot.scores(results)) if results else "", **place}
    if results:  # first, so that a row of quality.csv always has its single rows
        append_rows("quality_rows", zero_shot.single_rows({**labels, "commit": place["commit"]}, results))
    append_rows("quality", [row])
    if not args.json:
        print(
            f"{task['variant']:<28} {task['blocks']:>2} fewer  repair {task['repair']:<6} seed {task['seed']}  "
            f"{row['parameters']:>12,}  perplexity {row['perplexity']:>8.2f}  {row['prune_s']:>6.0f} s  "
            f"{row['peak_mb']:>6} MB  zero-shot in {found['zero_shot_s']:.0f} s {row['accuracy']}",
            flush=True,
        )
    return row


def file_name(labels: dict[str, Any], commit: str) -> str:
    parts = [labels[k] for k in ("variant", "blocks_fewer", "repair", "calibration", "seed")]
    return "-".join(re.sub(r"\W+", "_", str(part)) for part in (*parts, commit))


if __name__ == "__main__":
    main()
