"""`depthprune`: thin commands over the public functions. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from depthprune_runtime import __version__
from depthprune_runtime.errors import InputError

_INTERRUPTED = 130


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def _progress(args: argparse.Namespace) -> Any:
    from depthprune_runtime.progress import Progress

    return Progress(visible=not args.quiet)


def _summary(parent: Any, spec: Any) -> dict[str, Any]:
    before, after = parent.num_parameters(), spec.num_parameters()
    return {
        "sublayers": len(spec.sublayers),
        "parent_sublayers": len(parent.sublayers),
        "parameters": after,
        "parent_parameters": before,
        "sparsity": 1 - after / before,
    }


# Options of single methods: command-line name -> field of the method's options.
_METHOD_OPTIONS = {
    "score": "score",
    "protect_last": "protect_last",
    "distance": "distance",
    "front_protection": "front_protection",
    "fast": "fast",
    "state": "state_file",
    "pairs_only": "pairs_only",
    "keep_width": "keep_width",
    "compensate": "compensate",
    "leverage_lam": "leverage_lam",
}


def _repair_choice(args: argparse.Namespace) -> Any:
    from depthprune_runtime.pruning.options import RepairOptions

    given = {
        "lam": args.repair_lam,
        "weighting": args.repair_weighting,
        "answers_for": args.repair_answers_for,
        "samples": args.repair_samples,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.repair == "none" and given:
        raise InputError(f"repair: none takes no options, got {', '.join(given)}")
    return "none" if args.repair == "none" else RepairOptions(**given)


def _prune(args: argparse.Namespace) -> None:
    from depthprune_runtime.pruning.prune import prune

    options = {field: getattr(args, name) for name, field in _METHOD_OPTIONS.items()}
    result = prune(
        args.model,
        args.output,
        args.method,
        blocks=args.blocks,
        sublayers=args.sublayers,
        sparsity=args.sparsity,
        repair=_repair_choice(args),
        calibration=args.calibration,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        progress=_progress(args),
        **{field: value for field, value in options.items() if value is not None},
    )
    summary = _summary(result.parent, result.spec)
    if args.json:
        _print_json({"output": str(result.path), **summary, "plan": result.plan.to_json()})
        return
    counts = {kind: sum(e.kind == kind for e in result.plan.edits) for kind in ("drop", "flatten", "narrow")}
    did = ", ".join(f"{kind} {n}" for kind, n in counts.items() if n) or "nothing"
    print(
        f"{result.path}: {args.method} ({did}); {summary['sublayers']} of {summary['parent_sublayers']} sub-layers and "
        f"{summary['parameters']:,} of {summary['parent_parameters']:,} parameters left "
        f"(sparsity {result.sparsity:.1%}, embeddings included)"
    )


def _import(args: argparse.Namespace) -> None:
    from depthprune_runtime.pruning.prune import import_model

    spec = import_model(args.model, args.output, dtype=args.dtype, progress=_progress(args))
    if args.json:
        _print_json({"output": args.output, "parameters": spec.num_parameters(), "spec": spec.to_json()})
    else:
        print(f"{args.output}: {len(spec.sublayers)} sub-layers, {spec.num_parameters():,} parameters")


def _inspect(args: argparse.Namespace) -> None:
    from depthprune_runtime.checkpoint import open_checkpoint
    from depthprune_runtime.inspection import inspect, render

    description = inspect(open_checkpoint(args.model))
    if args.json:
        _print_json(description)
    else:
        print(render(description))


def _load(args: argparse.Namespace) -> Any:
    from depthprune_runtime.engine.runtime import Runtime

    return Runtime.load(args.model, args.device, args.dtype)


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
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
    runtime = _load(args)
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
        _print_json([o.to_json() for o in outputs])
        return
    for output in outputs:
        for completion in output.outputs:
            print(completion.text)


def _perplexity(args: argparse.Namespace) -> None:
    from depthprune_runtime.evaluation.perplexity import perplexity
    from depthprune_runtime.texts import load_text

    text = load_text(args.text)
    runtime = _load(args)
    result = perplexity(runtime, text, args.seq_len, args.windows, args.rows, _progress(args))
    if args.json:
        _print_json(result.to_json())
    else:
        print(
            f"perplexity {result.perplexity:.4f} over {result.tokens:,} predictions in {result.windows} windows of "
            f"{result.seq_len} tokens"
        )


def _evaluate(args: argparse.Namespace) -> None:
    from depthprune_runtime.evaluation.tasks import evaluate, load_tasks, render

    tasks = load_tasks([name.strip() for name in args.tasks.split(",") if name.strip()], args.limit)
    results = evaluate(_load(args), tasks, args.batch_tokens, _progress(args))
    if args.json:
        _print_json([result.to_json() for result in results])
    else:
        print(render(results))


class _Parser(argparse.ArgumentParser):
    """One line for a usage error, as for every other one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _add_placement(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help=f"bf16, fp16 or fp32 {what} (default: the source's)")


def _add_prune(commands: Any, common: _Parser) -> None:
    from depthprune_runtime.pruning.names import METHODS, REPAIRS

    p = commands.add_parser("prune", parents=[common], help="make a dense model shallower, without training")
    p.add_argument("model", metavar="MODEL", help="our file, a Hugging Face folder or hub id, or a GGUF file")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="the pruned, self-contained file")
    p.add_argument("--method", choices=METHODS, default="shortgpt")
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument("--blocks", type=int, metavar="N", help="N blocks fewer (finercut: their parameters)")
    size.add_argument("--sublayers", type=int, metavar="N", help="finercut: sub-layers to drop")
    size.add_argument(
        "--sparsity", type=float, metavar="R", help="least share of parameters to remove, embeddings included"
    )
    p.add_argument(
        "--calibration",
        default="builtin",
        metavar="TEXT",
        help="UTF-8 file, or builtin (English that Python carries; default) or wikitext2",
    )
    p.add_argument("--samples", type=int, metavar="N", help="calibration windows (default: what suits the method)")
    p.add_argument("--seq-len", type=int, metavar="S", help="tokens in each (default: what suits the method)")
    p.add_argument("--seed", type=int, default=0, help="which windows are drawn (default 0)")
    p.add_argument(
        "--repair", choices=REPAIRS, default="ridge", help="closed-form repair of what stays (default ridge)"
    )
    _add_placement(p, "of the output")
    _add_method_options(p)
    p.set_defaults(run=_prune)


def _add_method_options(p: argparse.ArgumentParser) -> None:
    from depthprune_runtime.pruning.names import ANSWERS, DISTANCES, SCORES, WEIGHTINGS

    yes_or_no = argparse.BooleanOptionalAction
    g = p.add_argument_group("shortgpt")
    g.add_argument("--score", choices=SCORES, help=f"how blocks are ranked (default {SCORES[0]})")
    g.add_argument("--protect-last", action=yes_or_no, default=None, help="never drop the last block (default on)")
    g = p.add_argument_group("finercut")
    g.add_argument("--distance", choices=DISTANCES, help=f"between dense and pruned outputs (default {DISTANCES[0]})")
    g.add_argument("--front-protection", type=float, metavar="P", help="share of the front that goes last (0.4)")
    g.add_argument("--fast", action="store_true", default=None, help="re-score only the most promising candidates")
    g.add_argument("--state", metavar="FILE", help="save the search here after every step, and resume it from here")
    g = p.add_argument_group("flattengpt")
    g.add_argument("--pairs-only", action="store_true", default=None, help="merge no more than two blocks")
    g.add_argument("--keep-width", type=float, metavar="R", help="0: original width (default), 1: as wide as merged")
    g.add_argument("--no-narrow", dest="keep_width", action="store_const", const=1.0, help="the same as --keep-width 1")
    g.add_argument(
        "--compensate", action=yes_or_no, default=None, help="re-solve down_proj for lost channels (default)"
    )
    g.add_argument("--leverage-lam", type=float, metavar="L", help="ridge of channel scores, relative (default 10)")
    g = p.add_argument_group("repair")
    g.add_argument("--repair-lam", type=float, metavar="L", help="ridge, relative to the mean of the Gram diagonal")
    g.add_argument("--repair-weighting", choices=WEIGHTINGS, help="of the tokens")
    g.add_argument("--repair-answers-for", choices=ANSWERS, help="who answers for a dropped sub-layer")
    g.add_argument("--repair-samples", type=int, metavar="N", help="windows of the repair's walk")


def _add_generate(commands: Any, common: _Parser) -> None:
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
    p.add_argument("--seed", type=int)
    p.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    p.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID")
    p.add_argument("--logprobs", type=int, metavar="N", help="report the N most likely tokens (with --json)")
    p.add_argument("-n", type=int, help="outputs per prompt")
    _add_placement(p, "to compute in")
    p.set_defaults(run=_generate)


def _add_perplexity(commands: Any, common: _Parser) -> None:
    p = commands.add_parser("perplexity", parents=[common], help="perplexity of a text")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--text", required=True, help="UTF-8 file (plain or .gz), or builtin-test or wikitext2-test")
    p.add_argument("--seq-len", type=int, default=2048, metavar="S", help="tokens in a window (default 2048)")
    p.add_argument("--windows", type=int, metavar="N", help="only the first N windows")
    p.add_argument("--rows", action="store_true", help="join the lines by blank lines, as the pruning papers do")
    _add_placement(p, "to compute in")
    p.set_defaults(run=_perplexity)


def _add_evaluate(commands: Any, common: _Parser) -> None:
    p = commands.add_parser("evaluate", parents=[common], help="zero-shot accuracy on tasks")
    p.add_argument("model", metavar="MODEL")
    p.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help="FILE.jsonl[.gz]; the name of such a file in $DEPTHPRUNE_DATA (arc_easy, hellaswag, openbookqa, piqa, "
        "winogrande); or any task of lm-eval, with the extra [eval]",
    )
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    p.add_argument("--batch-tokens", type=int, default=4096, metavar="T", help="tokens in a pass (default 4096)")
    _add_placement(p, "to compute in")
    p.set_defaults(run=_evaluate)


def build_parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common.add_argument("--quiet", "-q", action="store_true", help="no progress bars")
    parser = _Parser(prog="depthprune", description="Make large language models shallower, and run the result.")
    parser.add_argument("--version", action="version", version=f"depthprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_prune(commands, common)
    p = commands.add_parser("import", parents=[common], help="write a dense model as one self-contained file")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("-o", "--output", required=True, metavar="FILE")
    p.add_argument("--dtype", default="auto", help="bf16, fp16 or fp32 (default: the source's)")
    p.set_defaults(run=_import)
    p = commands.add_parser("inspect", parents=[common], help="sub-layers, sizes, plan and provenance of a model")
    p.add_argument("model", metavar="MODEL")
    p.set_defaults(run=_inspect)
    _add_generate(commands, common)
    _add_perplexity(commands, common)
    _add_evaluate(commands, common)
    return parser


def _terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 bad input or a failed read or write, one line on stderr; 2 usage; 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="depthprune: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)  # so that temporary files are removed
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except InputError as error:
        print(f"depthprune: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of stdout has gone, as in `depthprune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        name = f"{Path(str(error.filename))}: " if error.filename else ""
        print(f"depthprune: {name}{error.strerror or error}", file=sys.stderr)
        return 1
    except MemoryError:
        print("depthprune: out of memory; use a smaller model, window or dtype", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("depthprune: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
