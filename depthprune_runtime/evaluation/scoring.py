"""Log-likelihood of continuations, what zero-shot multiple choice compares.

    score = sum over t of log p(continuation_t | context, continuation_<t)

Scored as lm-evaluation-harness does (its HFLM, arXiv 2405.14782): context and continuation are split by
token count, and a text longer than the model's context loses tokens at its left. Log-probabilities are
float32 even where the model computes in less.

Continuations of the same context (the choices of a question) share its keys and values in a paged cache:
the context runs once.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from depthprune_runtime.engine.kv_cache import KVCache, kv_blocks_needed
from depthprune_runtime.engine.runtime import Runtime
from depthprune_runtime.errors import InputError
from depthprune_runtime.evaluation.logprobs import token_logprobs
from depthprune_runtime.host.devices import overflow_hint
from depthprune_runtime.model.batch import PagedContext, packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.progress import Advance

logger = logging.getLogger(__name__)
_KV_BLOCK_SIZE = 16  # tokens

TokenPair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of its continuation


class ContinuationScore(NamedTuple):
    """logprob: sum over the continuation's tokens, in nats; is_greedy: each of them is the arg-max."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class _Group:
    """Continuations of one context. indices: which requests they are."""

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]]
    indices: list[int]

    @property
    def shared(self) -> int:
        """Context tokens computed once: all but the last, which predicts each continuation's first token."""
        return len(self.context) - 1 if len(self.continuations) > 1 else 0

    @property
    def tails(self) -> list[tuple[int, ...]]:
        """What runs for each continuation: the rest of the context and all but the last target."""
        return [self.context[self.shared :] + c[:-1] for c in self.continuations]

    @property
    def tokens(self) -> int:
        return self.shared + sum(map(len, self.tails))


def encode(runtime: Runtime, text: str, add_special_tokens: bool = True) -> list[int]:
    return runtime.require_tokenizer("text cannot be scored").encode(text, add_special_tokens)


def prefix_token_id(runtime: Runtime) -> int:
    """BOS, or EOS where the model has none: what stands for an empty context."""
    for name in ("bos_token", "eos_token"):
        token = None if runtime.tokenizer is None else runtime.tokenizer.special_token_id(name)
        if token is not None:
            return token
    raise InputError(f"{runtime.name}: an empty context needs a BOS or EOS token, and the model names neither")


def encode_pair(runtime: Runtime, context: str, continuation: str) -> TokenPair:
    """Ids of both: the whole is encoded, and what follows the encoded context is the continuation.

    As in lm-eval, white space at the end of the context goes to the continuation, and an empty context is
    `prefix_token_id`.
    """
    stripped = context.rstrip()
    if not stripped:
        return [prefix_token_id(runtime)], encode(runtime, context + continuation, add_special_tokens=False)
    ids = encode(runtime, stripped)
    return ids, encode(runtime, context + continuation)[len(ids) :]


def _truncated(runtime: Runtime, index: int, pair: TokenPair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pair with the context's left cut off where the model's context is too short. The last target is no input."""
    context, continuation = tuple(pair[0]), tuple(pair[1])
    limit, vocab_size = runtime.spec.max_position_embeddings, runtime.spec.vocab_size
    if not context or not continuation:
        empty = "continuation" if context else "context"
        raise InputError(f"requests[{index}]: expected at least one token of context and continuation, got no {empty}")
    if len(continuation) > limit:
        raise InputError(
            f"requests[{index}]: expected a continuation of at most {limit} tokens (the model's context), "
            f"got {len(continuation)}"
        )
    if not all(0 <= token < vocab_size for token in context + continuation):
        raise InputError(f"requests[{index}]: expected token ids from 0 to {vocab_size - 1}")
    return context[-(limit + 1 - len(continuation)) :], continuation


def _grouped(runtime: Runtime, requests: Sequence[TokenPair]) -> list[_Group]:
    """Requests by context, the longest groups first, so that a batch too large for memory fails at once."""
    groups: dict[tuple[int, ...], _Group] = {}
    cut = 0
    for index, pair in enumerate(requests):
        context, continuation = _truncated(runtime, index, pair)
        cut += len(context) < len(pair[0])
        group = groups.setdefault(context, _Group(context, [], []))
        group.continuations.append(continuation)
        group.indices.append(index)
    if cut:
        logger.warning(
            "%d of %d texts are longer than the model's context and were cut at the left", cut, len(requests)
        )
    return sorted(groups.values(), key=lambda group: group.tokens, reverse=True)


def _batches(groups: Sequence[_Group], batch_tokens: int) -> Iterator[list[_Group]]:
    batch: list[_Group] = []
    tokens = 0
    for group in groups:
        if batch and tokens + group.tokens > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(group)
        tokens += group.tokens
    if batch:
        yield batch


def _pass(
    decoder: Decoder,
    cache: KVCache,
    sequences: Sequence[Sequence[int]],  # new ids of each sequence
    starts: Sequence[int],  # tokens of each that the cache already holds
    tables: Sequence[Sequence[int]],  # kv_blocks of each, with room for both
    select: Tensor,  # [R] int64
) -> Tensor:  # [R, C]
    """Write the keys and values of new tokens to the cache; final hidden states of the selected ones."""
    device, size = decoder.device, _KV_BLOCK_SIZE
    lengths = [len(s) for s in sequences]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    slots = [
        table[position // size] * size + position % size
        for start, end, table in zip(starts, ends, tables, strict=True)
        for position in range(start, end)
    ]
    width = max(map(len, tables))
    paged = PagedContext(
        slot_mapping=torch.tensor(slots, device=device),
        block_tables=torch.tensor([[*t, *[0] * (width - len(t))] for t in tables], device=device),
        context_lens=torch.tensor(ends, device=device),
        fresh=not any(starts),
    )
    ids = torch.tensor(list(itertools.chain(*sequences)), device=device)
    return decoder.hidden_states(ids, packed(lengths, device, starts, paged), cache.pairs, select)


def _shared_tables(batch: Sequence[_Group]) -> tuple[list[list[int]], list[list[int]], list[tuple[int, int]], int]:
    """kv_blocks of each shared beginning and of each tail, which to copy (from, to), and how many there are.

    A tail reads its group's full kv_blocks in place and continues in a copy of the last, unfinished one.
    """
    free = itertools.count()
    prefixes: list[list[int]] = []
    tails: list[list[int]] = []
    copies: list[tuple[int, int]] = []
    for group in batch:
        full, rest = divmod(group.shared, _KV_BLOCK_SIZE)
        prefix = list(itertools.islice(free, full + (rest > 0)))
        if prefix:
            prefixes.append(prefix)
        for tail in group.tails:
            own = list(itertools.islice(free, kv_blocks_needed(rest + len(tail), _KV_BLOCK_SIZE)))
            tails.append(prefix[:full] + own)
            if rest:
                copies.append((prefix[full], own[0]))
    return prefixes, tails, copies, next(free)


def _shared_pass(decoder: Decoder, batch: Sequence[_Group], select: Tensor) -> Tensor:  # [R] -> [R, C]
    """The groups' shared beginnings once, then every tail on top of its group's."""
    prefix_tables, tail_tables, copies, num_kv_blocks = _shared_tables(batch)
    cache = KVCache(decoder.spec, num_kv_blocks, _KV_BLOCK_SIZE, decoder.device, decoder.dtype)
    beginnings = [g.context[: g.shared] for g in batch if g.shared]
    any_one = torch.zeros(1, dtype=torch.int64, device=decoder.device)  # nothing is predicted from a beginning
    _pass(decoder, cache, beginnings, [0] * len(beginnings), prefix_tables, any_one)
    if copies:
        source, target = torch.tensor(copies, device=decoder.device).unbind(1)
        for pages in itertools.chain.from_iterable(pair for pair in cache.pairs if pair is not None):
            pages[target] = pages[source]
    starts = [g.shared for g in batch for _ in g.continuations]
    return _pass(decoder, cache, [t for g in batch for t in g.tails], starts, tail_tables, select)


def _score_batch(decoder: Decoder, batch: Sequence[_Group]) -> list[ContinuationScore]:
    """Scores of all continuations, group by group."""
    tails = [t for g in batch for t in g.tails]
    targets = [c for g in batch for c in g.continuations]
    ends = itertools.accumulate(map(len, tails))
    chosen = [i for end, target in zip(ends, targets, strict=True) for i in range(end - len(target), end)]
    select = torch.tensor(chosen, device=decoder.device)
    if any(g.shared for g in batch):
        hidden = _shared_pass(decoder, batch, select)
    else:
        ids = torch.tensor(list(itertools.chain(*tails)), device=decoder.device)
        hidden = decoder.hidden_states(ids, packed(list(map(len, tails)), decoder.device), select=select)
    wanted = torch.tensor(list(itertools.chain(*targets)), device=decoder.device)
    found = token_logprobs(decoder, hidden, wanted)
    logprobs, hits = found.logprobs.tolist(), found.greedy.tolist()
    bounds = itertools.pairwise(itertools.accumulate(map(len, targets), initial=0))
    return [ContinuationScore(math.fsum(logprobs[a:b]), all(hits[a:b])) for a, b in bounds]


@torch.inference_mode()
def continuation_logprobs(
    runtime: Runtime,
    requests: Sequence[TokenPair],
    batch_tokens: int = 4096,
    advance: Advance = lambda: None,
) -> list[ContinuationScore]:
    """Score of each (context ids, continuation ids), in the order given.

    batch_tokens: tokens in one forward pass, unless a single context with its continuations needs more;
    advance: called once a request. Raises InputError for an empty side, a continuation longer than the
    model's context, or weights whose log-probabilities are not finite.
    """
    if batch_tokens < 1:
        raise InputError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    scores: dict[int, ContinuationScore] = {}
    for batch in _batches(_grouped(runtime, requests), batch_tokens):
        indices = [i for group in batch for i in group.indices]
        for index, score in zip(indices, _score_batch(runtime.decoder, batch), strict=True):
            if not math.isfinite(score.logprob):
                raise InputError(
                    f"{runtime.name}: log-probabilities are not finite; {overflow_hint(runtime.dtype)}, or else its "
                    "weights are damaged"
                )
            scores[index] = score
            advance()
    return [scores[i] for i in range(len(requests))]
