"""Random requests of every kind against one engine, with a watched stream beside them: counts, leaks, gaps, memory.

    python benchmarks/bench_abuse.py --requests 20000

The model is a pico model (tests/helpers/pico.py) with random weights: what is measured is the engine, not the model.
Prints one JSON object; exit status 1 if anything unexpected happened or anything was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import abuse
import pico
import torch

from depthprune_runtime import Runtime


async def _run(runtime: Runtime, requests: int, together: int, seed: int) -> dict[str, Any]:
    run = abuse.Abuse(runtime, requests, together, seed)
    begin = time.perf_counter()
    try:
        await run.run()
        return {**run.report(), "left_behind": abuse.leaks(run), "seconds": round(time.perf_counter() - begin, 1)}
    finally:
        await run.engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--together", type=int, default=24, help="requests at a time (default 24)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = pico.build_model("llama", num_hidden_layers=6)
        runtime = Runtime.load(pico.save(model, Path(folder)), device="cpu")
        report = asyncio.run(_run(runtime, args.requests, args.together, args.seed))
    print(json.dumps(report, indent=2))
    return int(bool(report["unexpected"]) or any(report["left_behind"].values()))


if __name__ == "__main__":
    sys.exit(main())
