"""Perplexity over a text in windows without overlap.

    ppl = exp( mean over windows of mean over t >= 1 of -log p(token_t | tokens before it in the window) )

The text is tokenised once; each window of S tokens gives S - 1 predictions; the rest at the end that does
not fill a window is left out, as in the GPTQ convention.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.engine.runtime import Runtime
from depthprune_runtime.errors import InputError
from depthprune_runtime.evaluation.logprobs import token_logprobs
from depthprune_runtime.host.devices import overflow_hint
from depthprune_runtime.model.batch import packed
from depthprune_runtime.progress import Progress
from depthprune_runtime.texts import known_ids, rows_joined

_MOST_NATS = 700.0  # e to the power of more is no float


@dataclass(frozen=True)
class Perplexity:
    """tokens: predictions that were scored; windows: how many; seq_len: tokens in each."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def token_windows(ids: list[int], seq_len: int, windows: int | None) -> Tensor:  # [N, S] int64
    """The first `windows` (default all) consecutive windows."""
    if seq_len < 2:
        raise InputError(f"seq_len: expected at least 2, got {seq_len}")
    if windows is not None and windows < 1:
        raise InputError(f"windows: expected at least 1, got {windows}")
    available = len(ids) // seq_len
    wanted = available if windows is None else windows
    if available == 0 or wanted > available:
        needed = max(wanted, 1)
        raise InputError(
            f"text is too short: {needed} windows of {seq_len} need {needed * seq_len:,} tokens, got {len(ids):,}"
        )
    return torch.tensor(ids[: wanted * seq_len], dtype=torch.int64).view(wanted, seq_len)


@torch.inference_mode()
def window_nll(runtime: Runtime, window: Tensor) -> float:  # [S] int64
    """Mean negative log-likelihood of tokens 1 .. S - 1, in nats."""
    decoder = runtime.decoder
    ids = window.to(runtime.device)
    hidden = decoder.hidden_states(ids, packed([ids.shape[0]], runtime.device))[:-1]
    logprobs = token_logprobs(decoder, hidden, ids[1:]).logprobs
    return -float(logprobs.double().mean())


def perplexity(
    runtime: Runtime,
    text: str,
    seq_len: int = 2048,
    windows: int | None = None,
    rows: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a model on a text, in windows without overlap.

    Args:
        runtime: the model, with its tokenizer.
        text: what to score.
        seq_len: tokens in a window, 2 to the model's context.
        windows: only the first so many; by default all that the text fills.
        rows: join the text's lines as the papers do (`texts.rows_joined`).
        progress: bars on stderr; by default none.

    Returns:
        The perplexity, and how many predictions it is over.

    Raises:
        InputError: for a text that is too short, and for logits that are not finite.
    """
    limit = runtime.spec.max_position_embeddings
    if seq_len > limit:
        raise InputError(f"seq_len: expected at most the model's context of {limit}, got {seq_len}")
    tokenizer = runtime.require_tokenizer("text cannot be scored")
    encoded = tokenizer.encode(rows_joined(text) if rows else text)
    ids = known_ids(encoded, runtime.spec.vocab_size, runtime.name)
    chosen = token_windows(ids, seq_len, windows)
    losses = []
    with (progress or Progress()).stage("perplexity", len(chosen)) as advance:
        for window in chosen:
            losses.append(window_nll(runtime, window))
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"{runtime.name}: the logits of window {len(losses)} are not finite; "
                    f"{overflow_hint(runtime.dtype)}, or else its weights are damaged"
                )
            advance()
    mean = math.fsum(losses) / len(losses)
    if mean > _MOST_NATS:
        raise InputError(f"{runtime.name}: a loss of {mean:.0f} nats a token is a perplexity beyond all numbers")
    return Perplexity(math.exp(mean), len(chosen) * (seq_len - 1), len(chosen), seq_len)
