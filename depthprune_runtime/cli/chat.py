"""`depthprune chat`: a conversation in the terminal, or one line of a pipe after another."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from depthprune_runtime.cli.common import add_activations, add_placement
from depthprune_runtime.cli.parser import Parser
from depthprune_runtime.errors import InputError

_END = "/exit"
_ANEW = "/reset"


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, until the end of the input or `/exit`."""
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        if line.strip() == _END:
            return
        if line.strip():
            yield line


def _reply(runtime: Any, messages: list[dict[str, str]], options: dict[str, Any]) -> tuple[str, int, float]:
    """Print the answer as it comes: its text, its tokens, and the seconds from the first token to the last."""
    _, ids = runtime.require_tokenizer("it cannot chat").encode_chat(messages)
    text, count, first, last = "", 0, 0.0, 0.0
    for chunk in runtime.stream([ids], **options):
        last = time.perf_counter()
        first = first or last
        count += len(chunk.token_ids)
        text += chunk.text
        print(chunk.text, end="", flush=True)
    print()
    return text, count, last - first


def _chat(args: argparse.Namespace) -> None:
    from depthprune_runtime.engine.runtime import Runtime

    runtime = Runtime.load(args.model, args.device, args.dtype, activations=args.activations, keep_prefixes=True)
    names = ("temperature", "top_p", "top_k", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options["max_tokens"] = args.max_new_tokens
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` then edits its line, and remembers earlier ones
    if interactive and not args.quiet:
        print(f"{_ANEW} begins anew, {_END} or Ctrl+D ends", file=sys.stderr)
    total, seconds = 0, 0.0
    for line in _lines(interactive):
        if line.strip() == _ANEW:
            messages = list(opening)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            text, count, took = _reply(runtime, asked, options)
        except InputError as error:
            if not interactive:
                raise
            print(f"depthprune: {error} ({_ANEW} begins anew)", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": text}]
        total, seconds = total + max(count - 1, 0), seconds + took
    if total and seconds and not args.quiet:
        print(f"{total / seconds:.1f} tokens a second, behind the first of each answer", file=sys.stderr)


def add_chat(commands: Any, common: Parser) -> None:
    p = commands.add_parser("chat", parents=[common], help="talk with a model in the terminal")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--system", metavar="TEXT", help="system prompt")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: what the context leaves)")
    p.add_argument("--temperature", type=float, help="0 is greedy")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--seed", type=int)
    add_placement(p, "to compute in")
    add_activations(p)
    p.set_defaults(run=_chat)
