"""`depthprune inspect`, `generate`, `perplexity` and `evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from depthprune_runtime.cli.common import add_activations, add_force, add_placement, load, print_json, progress, show
from depthprune_runtime.cli.parser import Parser
from depthprune_runtime.errors import InputError


def _inspect(args: argparse.Namespace) -> None:
    from depthprune_runtime.checkpoint import open_checkpoint
    from depthprune_runtime.inspection.describe import inspect, render

    checkpoint = open_checkpoint(args.model)
    description = inspect(checkpoint)
    if args.plot is not None:
        from depthprune_runtime.inspection.picture import plot_map

        plot_map(description, args.plot, args.force, checkpoint.source_files)
    if args.json:
        print_json(description)
    else:
        show(render(description))


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
        "seed",
        "stop",
        "stop_token_ids",
        "max_new_tokens",
        "logprobs",
        "n",
    )
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _generate(args: argparse.Namespace) -> None:
    if not args.prompt:
        raise InputError("prompt: expected at least one, got none; give --prompt TEXT (it can be repeated)")
    if args.chat and len(args.prompt) > 1:
        raise InputError(f"--chat: expected one --prompt, got {len(args.prompt)}")
    runtime = load(args)
    options = _sampling_options(args)
    if args.chat:
        outputs = [runtime.chat([{"role": "user", "content": args.prompt[0]}], **options)]
    elif args.json or len(args.prompt) > 1 or (args.n or 1) > 1:
        outputs = runtime.generate(args.prompt, **options)
    else:
        for chunk in runtime.stream(args.prompt[0], **options):
            print(chunk.text, end="", flush=True)
        print()
        return
    if args.json:
        print_json([o.to_json() for o in outputs])
        return
    for output in outputs:
        for completion in output.outputs:
            print(completion.text)


def _perplexity(args: argparse.Namespace) -> None:
    from depthprune_runtime.evaluation.perplexity import perplexity
    from depthprune_runtime.texts import load_text

    text = load_text(args.text)
    runtime = load(args)
    result = perplexity(runtime, text, args.seq_len, args.windows, args.rows, progress(args))
    if args.json:
        print_json(result.to_json())
    else:
        show(
            f"perplexity {result.perplexity:.4f} over {result.tokens:,} predictions in {result.windows} windows of "
            f"{result.seq_len} tokens"
        )


def _evaluate(args: argparse.Namespace) -> None:
    from depthprune_runtime.evaluation.tasks import evaluate, load_tasks, render

    tasks = load_tasks([name.strip() for name in args.tasks.split(",") if name.strip()], args.limit, args.offset)
    results = evaluate(load(args), tasks, args.batch_tokens, progress(args))
    if args.json:
        print_json([result.to_json() for result in results])
    else:
        show(render(results))


def add_generate(commands: Any, common: Parser) -> None:
    p = commands.add_parser("generate", parents=[common], help="generate text")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--prompt", "-p", action="append", help="repeat for several prompts in one batch")
    p.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="default 128")
    p.add_argument("--temperature", type=float, help="0 is greedy")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument("--repetition-penalty", type=float)
    p.add_argument("--presence-penalty", type=float)
    p.add_argument("--frequency-penalty", type=float)
    p.add_argument("--min-tokens", type=int, metavar="N", help="new tokens before anything but the limit ends it")
    p.add_argument("--seed", type=int)
    p.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    p.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID")
    p.add_argument("--logprobs", type=int, metavar="N", help="report the N most likely tokens (with --json)")
    p.add_argument("-n", type=int, help="outputs per prompt")
    add_placement(p, "to compute in")
    add_activations(p)
    p.set_defaults(run=_generate)


def add_perplexity(commands: Any, common: Parser) -> None:
    p = commands.add_parser("perplexity", parents=[common], help="perplexity of a text")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--text", required=True, help="UTF-8 file (plain or .gz), or builtin-test or wikitext2-test")
    p.add_argument("--seq-len", type=int, default=2048, metavar="S", help="tokens in a window (default 2048)")
    p.add_argument("--windows", type=int, metavar="N", help="only the first N windows")
    p.add_argument("--rows", action="store_true", help="join the lines by blank lines, as the pruning papers do")
    add_placement(p, "to compute in")
    add_activations(p)
    p.set_defaults(run=_perplexity)


def add_evaluate(commands: Any, common: Parser) -> None:
    p = commands.add_parser("evaluate", parents=[common], help="zero-shot accuracy on tasks")
    p.add_argument("model", metavar="MODEL")
    p.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help="FILE.jsonl[.gz]; the name of such a file in $DEPTHPRUNE_DATA (arc_easy, lambada_openai and so on); or "
        "any task of lm-eval, with the extra [eval]",
    )
    p.add_argument("--limit", type=int, metavar="N", help="only N rows of each task")
    p.add_argument("--offset", type=int, default=0, metavar="N", help="leave out the first N rows of each file")
    p.add_argument("--batch-tokens", type=int, default=4096, metavar="T", help="tokens in a pass (default 4096)")
    add_placement(p, "to compute in")
    add_activations(p)
    p.set_defaults(run=_evaluate)


def add_inspect(commands: Any, common: Parser) -> None:
    p = commands.add_parser("inspect", parents=[common], help="sub-layers, sizes, plan and provenance of a model")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--plot", metavar="FILE", help="draw the map of sub-layers, .png or .svg (extra [plot])")
    add_force(p, "the map")
    p.set_defaults(run=_inspect)
