"""Whole models of bench_gpu.py: decode and prefill of ours, dense and pruned, and of Transformers, in turn."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from on_gpu.models import Source, transformers_model, variant_spec
from on_gpu.timing import Budget, Clock, TokenClock
from torch import Tensor

from depthprune_runtime import SamplingParams
from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.inputs import Inputs
from depthprune_runtime.engine.options import KV_BLOCK_SIZE, EngineOptions
from depthprune_runtime.spec import DecoderSpec

DENSE = "ours dense"
PEERS = ("transformers eager", "transformers static, compiled")
_WORKSPACE = 1_500_000_000  # bytes a candidate takes besides its KV cache: activations, graphs
Prompts = list[list[int]]


@dataclass(frozen=True)
class Case:
    """batch prompts of `prompt` tokens; new ones of each; the first `skip` do not count. tokens 1: a prefill."""

    name: str
    batch: int
    prompt: int
    tokens: int
    skip: int = 0

    @property
    def decode(self) -> bool:
        return self.tokens > 1

    @property
    def mean_context(self) -> float:
        """Tokens in the cache while the counted ones are made, on average, the new one included."""
        return self.prompt + (self.skip + self.tokens) / 2

    def prompts(self, vocabulary: int, number: int) -> Prompts:
        """Those of round `number`."""
        draw = random.Random(f"{self.name} {number}")
        return [[draw.randrange(vocabulary) for _ in range(self.prompt)] for _ in range(self.batch)]

    def kv_bytes(self, spec: DecoderSpec, element_size: int) -> int:
        """Of a cache that holds every prompt with its new tokens, a kv_block each to spare."""
        blocks = -(-(self.prompt + self.tokens) // KV_BLOCK_SIZE) + 1
        return self.batch * blocks * KV_BLOCK_SIZE * spec.kv_bytes_per_token(element_size)


class Ours:
    def __init__(self, source: Source, case: Case) -> None:
        decoder = source.decoder()
        self._case = case
        self._engine = Engine(
            decoder,
            Inputs("random", source.spec, None, {}),
            EngineOptions(
                kv_memory=case.kv_bytes(source.spec, source.pool.itemsize),
                max_num_seqs=case.batch,
                max_num_batched_tokens=max(case.batch * case.prompt, case.batch),  # all prompts in one pass
                enable_prefix_caching=False,
            ),
        )

    def __call__(self, prompts: Prompts) -> TokenClock:
        params = SamplingParams(temperature=0, max_tokens=self._case.tokens, ignore_eos=True)
        clock = TokenClock(len(prompts), self._case.skip)
        for prompt in prompts:
            self._engine.add_request(prompt, params)
        while self._engine.has_unfinished():
            clock.add(sum(len(delta.token_ids) for delta in self._engine.step()))
        return clock


class Streamer:
    """What generate() tells of its tokens: the prompts first, then a step at a time."""

    def __init__(self, clock: TokenClock) -> None:
        self._clock = clock
        self._prompts_seen = False

    def put(self, tokens: Tensor) -> None:
        if self._prompts_seen:
            self._clock.add(tokens.numel())
        self._prompts_seen = True

    def end(self) -> None:
        pass


class Transformers:
    """generate(), as its documentation says it is fast: eager, or a static cache, which it compiles on a GPU."""

    def __init__(self, model: Any, case: Case, static: bool) -> None:
        self._model = model
        self._case = case
        self._options: dict[str, Any] = {"cache_implementation": "static"} if static else {}

    def __call__(self, prompts: Prompts) -> TokenClock:
        ids = torch.tensor(prompts, device=self._model.device)
        clock = TokenClock(len(prompts), self._case.skip)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._case.tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=Streamer(clock),
            **self._options,
        )
        return clock


def groups(needs: Mapping[str, int], free: float) -> list[list[str]]:
    """Candidates that fit into memory together, ours dense in each group: it links their ratios."""
    found = [[DENSE]]
    used = needs[DENSE]
    for name, need in needs.items():
        if name == DENSE:
            continue
        if used + need > free and len(found[-1]) > 1:
            found.append([DENSE])
            used = needs[DENSE]
        found[-1].append(name)
        used += need
    return found


def free_bytes(device: torch.device) -> float:
    return 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Generation:
    """The candidates of one model. measure() gives tokens a second by candidate, round by round."""

    def __init__(self, model: str, pool: Tensor, variants: Sequence[str], peers: Sequence[str], budget: Budget) -> None:
        self._sources = {f"ours {v}": Source(variant_spec(model, v), pool) for v in dict.fromkeys(("dense", *variants))}
        self._peer = transformers_model(self._sources[DENSE]) if peers else None
        self._peers = peers
        self._budget = budget

    def spec(self, candidate: str) -> DecoderSpec:
        """Peers run the dense model."""
        return self._sources.get(candidate, self._sources[DENSE]).spec

    def measure(self, case: Case, rounds: int, clock: Clock) -> list[dict[str, list[float]]]:
        """One entry a group of candidates that fit into memory together."""
        size = self._sources[DENSE].pool.itemsize
        # a compiled decode step has nothing to do with a prefill
        peers = [p for p in self._peers if case.decode or p == PEERS[0]]
        names = [*self._sources, *peers]
        needs = {n: int(1.2 * case.kv_bytes(self.spec(n), size)) + _WORKSPACE for n in names}
        found = []
        for group in groups(needs, free_bytes(clock.device)):
            if found and self._budget.spent:
                break
            found.append(self._group(group, case, rounds, clock))
            release(clock.device)
        return found

    def _group(self, names: Sequence[str], case: Case, rounds: int, clock: Clock) -> dict[str, list[float]]:
        running: dict[str, Callable[[Prompts], TokenClock]] = {}
        vocabulary = self._sources[DENSE].spec.vocab_size
        for name in names:
            try:
                candidate = self._make(name, case)
                for number in range(2):  # the second sees what the first has compiled and captured
                    candidate(case.prompts(vocabulary, -1 - number))
                running[name] = candidate
            except Exception as error:  # a peer that does not run is named, the others go on
                if name == DENSE:
                    raise
                print(f"skipped: {name} {case.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        rates: dict[str, list[float]] = {name: [] for name in running}
        for number in range(rounds):
            if number and self._budget.spent:
                break
            for name, candidate in running.items():
                clock.synchronize()
                tokens = candidate(case.prompts(vocabulary, number))
                rate = tokens.rate(case.tokens) if case.decode else case.batch * case.prompt / tokens.first_s
                rates[name].append(rate)
        return rates

    def _make(self, name: str, case: Case) -> Callable[[Prompts], TokenClock]:
        if name in self._sources:
            return Ours(self._sources[name], case)
        return Transformers(self._peer, case, static=name == PEERS[1])
