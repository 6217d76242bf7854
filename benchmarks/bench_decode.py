"""Decode, prefill and load of the CPU path against Transformers, interleaved in one run.

    python benchmarks/bench_decode.py WEIGHTS.gguf [--rounds 7] [--tokens 64] [--json] [--no-record]

Every round runs each candidate once, in turn; medians and ratios are over rounds. Both sides decode the
same number of tokens greedily from the same prompt, bf16, all threads. Both sides load from safetensors.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import append_rows, environment, interleaved, paired_ratio, print_json, spread

from depthprune_runtime import Runtime, SamplingParams, import_model, prune
from depthprune_runtime.texts import load_text


def save_for_transformers(weights: Path, folder: Path) -> None:
    """The same bf16 weights as a Hugging Face folder."""
    import transformers
    from transformers import AutoModelForCausalLM, GgufConfig

    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def ours(runtime: Runtime, prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def run() -> None:
        for output in runtime.generate(prompts, params):
            assert len(output.outputs[0].token_ids) == tokens

    return run


def theirs(model: Any, prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    ids = torch.tensor(prompts)

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + tokens

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="do not append to benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense.safetensors", Path(folder) / "pruned.safetensors"
        import_model(args.weights, dense)
        prune(dense, pruned, blocks=6)
        peer = Path(folder) / "transformers"
        save_for_transformers(args.weights, peer)
        rows = measure(args, peer, Runtime.load(dense), Runtime.load(pruned), dense)
    if not args.no_record:
        append_rows("decode_cpu", rows)
    if args.json:
        print_json(rows)
        return
    for row in rows:
        print(
            f"{row['case']:<16} {row['candidate']:<23} {row['median_s']:>7.3f} s "
            f"[{row['q1_s']:.3f} .. {row['q3_s']:.3f}] "
            f"{row['tokens_per_s']:>8.1f} tok/s  {row['speedup_over_transformers']:>5.2f}x Transformers"
        )


def measure(
    args: argparse.Namespace, peer: Path, dense: Runtime, pruned: Runtime, dense_file: Path
) -> list[dict[str, Any]]:
    model = transformers_model(peer)
    assert dense.tokenizer is not None
    ids = dense.tokenizer.encode(load_text("builtin-test"))
    cases = {  # name -> prompts, new tokens
        "decode, batch 1": ([ids[:32]], args.tokens),
        "decode, batch 8": ([ids[32 * i : 32 * (i + 1)] for i in range(8)], args.tokens),
        "prefill 512": ([ids[:512]], 1),
    }
    place = environment()
    rows = []
    for case, (prompts, tokens) in cases.items():
        seconds = interleaved(
            {
                "transformers dense": theirs(model, prompts, tokens),
                "ours dense": ours(dense, prompts, tokens),
                "ours 6 of 30 dropped": ours(pruned, prompts, tokens),
            },
            args.rounds,
        )
        counted = len(prompts) * tokens if tokens > 1 else len(prompts[0])
        for candidate, values in seconds.items():
            stats = spread(values)
            rows.append(
                {
                    "model": "SmolLM2-135M-Instruct bf16",
                    "case": case,
                    "candidate": candidate,
                    "rounds": args.rounds,
                    "tokens": counted,
                    **{f"{k}_s": round(v, 5) for k, v in stats.items()},
                    "tokens_per_s": round(counted / stats["median"], 2),
                    "speedup_over_transformers": round(paired_ratio(seconds["transformers dense"], values), 3),
                    **place,
                }
            )
    return rows + load_rows(args, peer, dense_file, place)


def load_rows(args: argparse.Namespace, peer: Path, dense_file: Path, place: dict[str, str]) -> list[dict[str, Any]]:
    """Warm load time with and without verifying the checksums."""
    seconds = interleaved(
        {
            "transformers dense": lambda: transformers_model(peer),
            "ours dense": lambda: Runtime.load(dense_file),
            "ours dense, unverified": lambda: Runtime.load(dense_file, verify=False),
        },
        args.rounds,
    )
    rows = []
    for candidate, values in seconds.items():
        stats = spread(values)
        rows.append(
            {
                "model": "SmolLM2-135M-Instruct bf16",
                "case": "load, warm",
                "candidate": candidate,
                "rounds": args.rounds,
                "tokens": 0,
                **{f"{k}_s": round(v, 5) for k, v in stats.items()},
                "tokens_per_s": 0.0,
                "speedup_over_transformers": round(paired_ratio(seconds["transformers dense"], values), 3),
                **place,
            }
        )
    return rows


if __name__ == "__main__":
    main()
