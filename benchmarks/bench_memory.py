"""Memory that pruning takes: a random model larger than the memory it may use, one CSV row a configuration.

    python benchmarks/bench_memory.py [--method shortgpt,flattengpt,...] [--repairs none,ridge] [--hidden 2048
        --ffn 8192 --blocks 48 --heads 32 --kv-heads 8 --vocabulary 32000] [--drop 4] [--samples 4 --seq-len 256]
        [--folder DIR] [--keep]

What counts is *anonymous* memory (RssAnon of /proc/self/status, sampled every 10 ms by a thread of the pruning
process): pages of mapped files, such as the checkpoint's weights and our unlinked scratch files, belong to the page
cache, and the system takes them back whenever it needs to. Linux only.

The weights are random (std 0.02), so that only the memory means anything, not the pruned model. Few and short
calibration windows keep it quick; they change the peak little, because buffers that grow with their number go to disk
above a limit, while weights, Gram matrices and factors depend on the widths alone. A pass takes at most 4096 tokens:
with fewer than that in all, activations are smaller than they would be with more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import append_rows, environment, print_json

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "shortgpt": ("shortgpt", {"score": "block-influence"}),
    "shortgpt, after-repair": ("shortgpt", {"score": "after-repair"}),
    "flattengpt": ("flattengpt", {}),
    # scoring the spans of this shape is long on few cores; the matrices of the narrowing are four times as large
    "flattengpt, similarity": ("flattengpt", {"grouping": "similarity"}),
    "finercut": ("finercut", {"fast": True}),
}
_SAMPLE_SECONDS = 0.01


def build(path: Path, shape: argparse.Namespace) -> int:
    """Write a random Llama-shaped model in bf16, a tensor at a time; returns its bytes."""
    import tokenizers
    import torch

    from depthprune_runtime.checkpoint import Checkpoint, write_native
    from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec

    letters = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))  # one token a byte
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    class Random(Checkpoint):
        name = "random"
        dtype = torch.bfloat16
        provenance: Mapping[str, Any] = {
            "source": "random",
            "format": "random",
            "family": "llama",
            "blocks": shape.blocks,
        }
        spec = DecoderSpec(
            hidden_size=shape.hidden,
            vocab_size=shape.vocabulary,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            rope=RopeSpec(),
            tie_word_embeddings=False,
            sublayers=tuple(
                s
                for b in range(shape.blocks)
                for s in (
                    AttentionSpec(shape.heads, shape.kv_heads, shape.hidden // shape.heads, (b,)),
                    FFNSpec(shape.ffn, (b,)),
                )
            ),
        )

        @property
        def assets(self) -> Mapping[str, bytes]:
            return {"tokenizer.json": raw.to_str().encode()}

        def tensor(self, name: str) -> torch.Tensor:
            made = torch.empty(self.spec.tensor_shapes()[name], dtype=self.dtype)
            if name.endswith("norm.weight"):
                return made.fill_(1.0)
            return made.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))

    write_native(path, Random())
    return size(path)


def size(path: Path) -> int:
    """Bytes of the weights."""
    from depthprune_runtime.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, verify=False)
    return sum(checkpoint.tensor(n).nbytes for n in checkpoint.spec.tensor_shapes())


def memory() -> dict[str, int]:
    """Bytes of this process by kind: RssAnon, RssFile, RssShmem."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}


@contextlib.contextmanager
def watched(on_peak: Any = lambda: None) -> Iterator[dict[str, int]]:
    """Peaks of every kind of memory while the body runs; on_peak() is called at each new high of RssAnon."""
    peaks = memory()
    stop = threading.Event()

    def look() -> None:
        noted = peaks["RssAnon"]
        while not stop.wait(_SAMPLE_SECONDS):
            for kind, value in memory().items():
                peaks[kind] = max(peaks[kind], value)
            if peaks["RssAnon"] > noted + (16 << 20):
                noted = peaks["RssAnon"]
                on_peak()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def _where(main: int) -> str:
    """Our innermost frames of the main thread."""
    frame = sys._current_frames().get(main)
    found = []
    while frame is not None and len(found) < 4:
        if "depthprune_runtime" in frame.f_code.co_filename:
            found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: prune, and watch the memory."""
    from depthprune_runtime import prune
    from depthprune_runtime.pruning.method import method_options

    # what the imports take is there before any weight is read; they count, too
    import depthprune_runtime.pruning.prune  # noqa: F401  isort: skip

    method, values = METHODS[task["method"]]
    base = memory()["RssAnon"]
    main = threading.get_ident()
    trail: list[str] = []
    start = time.perf_counter()
    with watched(lambda: trail.append(_where(main))) as peaks:
        result = prune(
            task["dense"],
            task["output"],
            blocks=task["drop"],
            options=method_options(method, values),
            repair=task["repair"],
            samples=task["samples"],
            seq_len=task["seq_len"],
            device="cpu",
        )
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "sparsity": round(result.sparsity, 4),
        "start_anon_mb": base >> 20,
        "peak_anon_mb": peaks["RssAnon"] >> 20,
        "peak_file_mb": (peaks["RssFile"] + peaks["RssShmem"]) >> 20,
        "peak_at": trail[-1] if trail else "",
    }


def _in_child(task: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{task['method']}, repair {task['repair']}: the process ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="shortgpt;flattengpt, similarity", help=f"by ; of {list(METHODS)}")
    parser.add_argument("--repairs", default="ridge")
    for name, value in (
        ("hidden", 2048), ("ffn", 8192), ("blocks", 48), ("heads", 32), ("kv-heads", 8), ("vocabulary", 32000),
        ("drop", 4), ("samples", 4), ("seq-len", 256),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where the model is built (default: a temporary folder)")
    parser.add_argument(
        "--keep", action="store_true", help="keep the dense model in --folder, and use it if it is there"
    )
    parser.add_argument("--no-row", action="store_true", help="print only")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = _parser().parse_args()
    if args.task:
        print(json.dumps(measure(json.loads(args.task))))
        return
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="depthprune-", dir=args.folder)))
        folder = args.folder if args.keep and args.folder else scratch
        dense = folder / f"random-{args.hidden}-{args.ffn}-{args.blocks}-{args.vocabulary}.safetensors"
        nbytes = size(dense) if dense.is_file() else build(dense, args)
        for name in args.method.split(";"):
            for repair in args.repairs.split(","):
                output = scratch / "pruned.safetensors"
                task = {
                    "dense": str(dense), "output": str(output), "method": name, "repair": repair, "drop": args.drop,
                    "samples": args.samples, "seq_len": args.seq_len,
                }  # fmt: skip
                found = _in_child(task)
                for file in scratch.glob("pruned*"):
                    file.unlink()
                row = {
                    "method": name,
                    "repair": repair,
                    "model": f"hidden {args.hidden} ffn {args.ffn} blocks {args.blocks} vocabulary {args.vocabulary}",
                    "model_mb": nbytes >> 20,
                    "blocks_fewer": args.drop,
                    "windows": f"{args.samples} x {args.seq_len}",
                    **found,
                    **environment(),
                }
                print_json(row)
                if not args.no_row:
                    append_rows("memory", [row])


if __name__ == "__main__":
    main()
