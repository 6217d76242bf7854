"""A real language model made shallower, run and measured, in a few minutes.

    python benchmarks/demo.py WEIGHTS.gguf [--json]

Imports the model, drops 3 and 6 of its 30 blocks by Block Influence, without and with a (small) repair, and
prints a before/after table and a sample of each. Calibration and test text are separate parts of the help
texts that Python carries.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench_decode import ours
from common import interleaved, print_json, spread

from depthprune_runtime import RepairOptions, Runtime, ShortGPTOptions, import_model, perplexity, prune
from depthprune_runtime.progress import Progress
from depthprune_runtime.texts import load_text

PROMPT = "A good way to learn a new language is"
CASES = ((3, "none"), (3, "ridge"), (6, "ridge"))  # blocks to drop, repair
NEW_TOKENS = 48
PREFILL = 512


def measure_quality(runtimes: dict[str, Runtime]) -> dict[str, float]:
    text = load_text("builtin-test")
    found = {}
    for name, runtime in runtimes.items():
        found[name] = perplexity(runtime, text, seq_len=1024, windows=8, progress=Progress(True)).perplexity
    return found


def measure_speed(runtimes: dict[str, Runtime], tokens: int, prompt: int) -> dict[str, float]:
    """Tokens per second: new ones, or prompt tokens where only one is generated."""
    ids = list(range(1000, 1000 + prompt))
    seconds = interleaved({name: ours(r, [ids], tokens) for name, r in runtimes.items()}, rounds=5)
    counted = tokens if tokens > 1 else prompt
    return {name: counted / spread(values)["median"] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        import_model(args.weights, dense, progress=Progress(True))
        files = {"dense": dense}
        for blocks, repair in CASES:
            path = Path(folder) / f"pruned-{blocks}-{repair}.safetensors"
            mend = "none" if repair == "none" else RepairOptions(samples=32)
            # block influence in every case: `auto` scores spans before a repair, which takes minutes more
            score = ShortGPTOptions("block-influence")
            prune(dense, path, blocks=blocks, options=score, repair=mend, progress=Progress(True))
            files[f"{blocks} dropped{'' if repair == 'none' else ', repaired'}"] = path
        rows = table({name: Runtime.load(path) for name, path in files.items()})
    if args.json:
        print_json(rows)
        return
    show(rows)


def table(runtimes: dict[str, Runtime]) -> list[dict[str, Any]]:
    quality = measure_quality(runtimes)
    prefill = measure_speed(runtimes, 1, PREFILL)
    decode = measure_speed(runtimes, NEW_TOKENS, 16)
    rows = []
    for name, runtime in runtimes.items():
        spec = runtime.spec
        rows.append(
            {
                "model": name,
                "blocks": len(spec.attention_sublayers()),
                "parameters": spec.num_parameters(),
                "bytes_per_token": spec.bytes_per_token(runtime.dtype.itemsize),
                "perplexity": quality[name],
                "prefill_tokens_per_s": prefill[name],
                "decode_tokens_per_s": decode[name],
                "sample": PROMPT + runtime.generate(PROMPT, temperature=0, max_new_tokens=40).text,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"\nSmolLM2-135M-Instruct (bf16), perplexity on Python's help texts (8 windows of 1024), prefill of\n"
        f"{PREFILL}, decode of {NEW_TOKENS} at batch 1; speeds are medians of 5 interleaved rounds on this machine\n"
    )
    heads = ("model", "blocks", "parameters", "bytes/token", "perplexity", "prefill tok/s", "decode tok/s")
    print(f"{heads[0]:<20} {heads[1]:>6} {heads[2]:>12} {heads[3]:>12} {heads[4]:>10} {heads[5]:>14} {heads[6]:>18}")
    for row in rows:
        speedup = row["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"]
        print(
            f"{row['model']:<20} {row['blocks']:>6} {row['parameters']:>12,} {row['bytes_per_token']:>12,} "
            f"{row['perplexity']:>10.2f} {row['prefill_tokens_per_s']:>14.0f} "
            f"{row['decode_tokens_per_s']:>10.1f} ({speedup:.2f}x)"
        )
    for row in rows:
        print(f"\n--- {row['model']}\n{row['sample']}")


if __name__ == "__main__":
    main()
