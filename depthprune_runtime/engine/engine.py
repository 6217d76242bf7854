"""`Engine`: many requests over one model, a step at a time. What a serving backend embeds.

    engine = Runtime.load("pruned.safetensors").engine(kv_memory="2GiB")
    engine.add_request("Once upon a time", SamplingParams(max_tokens=32))
    while engine.has_unfinished():
        for delta in engine.step():
            print(delta.text, end="")

One thread at a time; `AsyncEngine` is for many callers.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from depthprune_runtime.engine.errors import EngineDead
from depthprune_runtime.engine.inputs import Inputs, Limits, RequestGroup
from depthprune_runtime.engine.kv_blocks import KVBlockPool
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.engine.memory import kv_bytes, num_kv_blocks
from depthprune_runtime.engine.news import alternatives, fail_in_text, group_result, new_text, output_delta
from depthprune_runtime.engine.options import EngineOptions, engine_options
from depthprune_runtime.engine.outputs import EngineStats, OutputDelta
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.process import Process
from depthprune_runtime.engine.prompts import Prompt
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.runner import Runner
from depthprune_runtime.engine.samplers import Choice, Samplers
from depthprune_runtime.engine.scheduler import Chunk, Scheduler
from depthprune_runtime.errors import InputError
from depthprune_runtime.model.decoder import Decoder

_log = logging.getLogger("depthprune_runtime")


class Engine:
    """A decoder, its KV cache and the requests that run on them.

    A request's tokens depend on its prompt and seed. What runs beside it may change the last bits of its logits, and so
    a choice between tokens that are almost equally likely. On a CPU that takes a step of more than 64 tokens, for which
    other kernels serve, or a piece of a prompt of so few tokens that decode's attention serves. These are up to 16
    divided by the query heads of a KV head, as a tight `max_num_batched_tokens`, a cached beginning or a preemption
    leave them. Log-probabilities of bfloat16 then differ by some hundredths, of float32 by 1e-6. On a GPU steps of
    1 and of more requests differ likewise.

    Args:
        decoder: the model's layers. `Runtime.engine` gives it, and inputs.
        inputs: turns prompts and parameters into requests.
        options: its sizes and limits; by default those of `EngineOptions()`.

    Raises:
        InputError: where the KV cache does not fit into memory, or not one kv_block into `kv_memory`.
    """

    def __init__(
        self,
        decoder: Decoder,
        inputs: Inputs,
        options: EngineOptions | None = None,
    ) -> None:
        self.options = options = engine_options(options, {})
        self._limits = Limits(min(options.max_n, options.max_waiting or options.max_n), options.max_logprobs)
        self.inputs = inputs
        self._decoder = decoder
        seqs, block_size = options.max_num_seqs, options.kv_block_size
        memory = kv_bytes(options.kv_memory, decoder.device)
        contexts = seqs * -(-decoder.spec.max_position_embeddings // block_size) + seqs
        count = num_kv_blocks(memory, decoder.spec, block_size, decoder.dtype, contexts)
        try:
            self._cache = KVCache(decoder.spec, count, block_size, decoder.device, decoder.dtype)
        except RuntimeError as error:  # torch's out-of-memory errors
            raise InputError(f"kv_memory: {memory} bytes cannot be allocated; lower it ({error})") from error
        self._pool = KVBlockPool(count, block_size, options.enable_prefix_caching)
        self._scheduler = Scheduler(self._pool, seqs, options.max_num_batched_tokens, options.max_waiting)
        self._runner = Runner(decoder, self._cache, seqs)
        self._decode_steps = min(options.decode_steps, self._runner.max_steps)
        self._groups: dict[str, RequestGroup] = {}
        self._samplers = Samplers(inputs.name, decoder.spec.vocab_size, decoder.device)
        self._news: list[OutputDelta] = []  # of aborted requests, for the next step
        self._numbers = itertools.count()
        self._process = Process("the engine")
        self._closed = False
        self._cause: BaseException | None = None
        self._num_steps = self._num_finished = self._num_output_tokens = 0

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache; 0 once the engine has stopped."""
        return self._cache.nbytes

    @property
    def closed(self) -> bool:
        """Whether it was closed, or stopped at a step that failed."""
        return self._closed

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._pool.num_kv_blocks * self._pool.kv_block_size

    def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestGroup:
        """The first half of `add_request`: everything that needs no state of the engine. Any thread may call it.

        Args:
            prompt: as in `add_request`.
            sampling_params: as in `add_request`.
            request_id: as in `add_request`.
            priority: as in `add_request`.

        Returns:
            The outputs to queue with `add`.

        Raises:
            InputError: for a prompt or parameters that can never run.
        """
        if request_id is None:  # random, so that no caller's own id is the same
            request_id = f"request-{next(self._numbers)}-{secrets.token_hex(8)}"
        return self.inputs.group(prompt, sampling_params, request_id, priority, limits=self._limits)

    def add(self, group: RequestGroup) -> str:
        """Queue a prepared request; the second half of `add_request`.

        Args:
            group: what `prepare` made; it can be queued once.

        Returns:
            Its request_id.

        Raises:
            InputError: for an id in use, and for what never fits into the KV cache.
            EngineFull: when `max_waiting` is reached.
            EngineDead: after `close` or a failed step.
        """
        self._require_alive()
        if group.request_id in self._groups:
            raise InputError(f"request_id: {group.request_id!r} is in use by an unfinished request")
        self._scheduler.add(group.requests)
        self._groups[group.request_id] = group
        return group.request_id

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a prompt.

        Args:
            prompt: text, token ids, or one of vLLM's dictionaries.
            sampling_params: by default the model's own.
            request_id: 1 to 256 printable characters; by default one that nobody else has.
            priority: lower is sooner (see `Scheduler` for the rule), -2**31 to 2**31 - 1.

        Returns:
            The request's id, which its deltas carry.

        Raises:
            InputError: for what can never run.
            EngineFull: when `max_waiting` is reached.
            EngineDead: after `close` or a failed step.
        """
        return self.add(self.prepare(prompt, sampling_params, request_id, priority))

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return not self._closed and (bool(self._news) or self._scheduler.has_unfinished)

    @torch.inference_mode()
    def step(self) -> list[OutputDelta]:
        """Compute one batch; what it brought each output, and the ends of those aborted since the last step.

        A request that fails alone ends with finish_reason "error". Any other exception than the two below is a defect
        or a lost device: the engine has then stopped for good.

        Raises:
            InputError: behind a fork, where OpenMP's threads are missing.
            EngineDead: after `close` or a failed step.
        """
        self._require_alive()
        self._process.check(self._decoder.device)
        try:
            deltas, self._news = self._news, []
            chunks = self._scheduler.schedule()
            if chunks:
                deltas += self._compute(chunks)
            return deltas
        except BaseException as error:
            self._stop(error)
            raise

    def _compute(self, chunks: list[Chunk]) -> list[OutputDelta]:
        steps = self._steps_ahead(chunks)
        samplers = self._samplers.of_all([c.request for c in chunks]) if steps > 1 else None
        if samplers is not None:
            tokens = self._runner.run_ahead(chunks, samplers, steps)
            self._num_steps += len(tokens)
            return self._take_ahead(chunks, tokens.tolist())
        self._num_steps += 1
        logits = self._runner.run(chunks)
        return [] if logits is None else self._sample(chunks, logits)

    def _steps_ahead(self, chunks: list[Chunk]) -> int:
        """Steps that can follow one another before anything of theirs is needed here."""
        if self._decode_steps == 1:
            return 1
        requests = [c.request for c in chunks]
        steps = min(self._decode_steps, *(r.max_new_tokens - r.num_output_tokens for r in requests))
        samplers = self._samplers.of_all(requests) if steps > 1 else None
        if samplers is None or not self._runner.may_run_ahead(requests, samplers):
            return 1
        return steps if self._scheduler.reserve(chunks, steps) else 1

    def _take_ahead(self, chunks: Sequence[Chunk], tokens: list[list[int]]) -> list[OutputDelta]:  # [steps][R]
        deltas = []
        for row in tokens:
            for (request, *_), token in zip(chunks, row, strict=True):
                if not request.finished:  # what a request computed after its end is dropped
                    deltas.append(self._advance(request, self._samplers.choice(token)))
        for request, *_ in chunks:
            if not request.finished:
                self._scheduler.catch_up(request)
        return deltas

    def _sample(self, chunks: Sequence[Chunk], logits: Tensor) -> list[OutputDelta]:  # [R, V]
        requests = [c.request for c in chunks if c.samples]
        return [self._advance(*pair) for pair in zip(requests, self._samplers.choose(requests, logits), strict=True)]

    def _advance(self, request: Request, choice: Choice) -> OutputDelta:
        """Give a request its next token; whatever goes wrong with it is its own end only."""
        before = len(request.token_ids)
        if choice.error is not None:
            request.fail(choice.error)
        else:
            try:
                request.append(choice.token, alternatives(choice.likely, self.inputs, request.params.detokenize))
            except Exception as error:
                fail_in_text(request, error)
        new = tuple(request.token_ids[before:])
        self._num_output_tokens += len(new)
        return self._delta(request, new, damaged=choice.error is not None)

    def _delta(self, request: Request, new: tuple[int, ...], damaged: bool = False) -> OutputDelta:
        """News of a request; takes it out if it has ended."""
        text, result = new_text(request), None
        if request.finish_reason is not None:
            if request.error is not None:
                _log.warning("request %s failed: %s", request.request_id, request.error)
            self._scheduler.remove(request, damaged)
            self._samplers.drop(request)
            self._num_finished += 1
            group = self._groups[request.request_id]
            group.num_unfinished -= 1
            if group.num_unfinished == 0:
                del self._groups[group.request_id]
                result = group_result(group)
        return output_delta(request, text, new, result)

    def abort(self, request_id: str) -> bool:
        """End a request and free its kv_blocks; its last delta comes with the next step.

        Args:
            request_id: of the request.

        Returns:
            False if it is unknown or has ended.

        Raises:
            EngineDead: after `close` or a failed step.
        """
        self._require_alive()
        group = self._groups.get(request_id)
        if group is None:
            return False
        for request in group.requests:
            if not request.finished:
                request.abort()
                self._news.append(self._delta(request, ()))
        return True

    def abort_all(self) -> None:
        """End all requests and free their kv_blocks; nothing more is told of them.

        Raises:
            EngineDead: after `close` or a failed step.
        """
        self._require_alive()
        for request_id in list(self._groups):
            self.abort(request_id)
        self._news = []

    def stats(self) -> EngineStats:
        """State and totals, at any time."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            num_kv_blocks=self._pool.num_kv_blocks,
            num_free_kv_blocks=self._pool.num_free,
            num_cached_kv_blocks=self._pool.num_cached,
            num_steps=self._num_steps,
            num_finished=self._num_finished,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._scheduler.num_prompt_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def clear_prefix_cache(self) -> None:
        """Forget the contents of all kv_blocks; running requests go on."""
        self._pool.clear_cache()

    def close(self) -> None:
        """Drop all requests and the KV cache. The decoder is not ours to close."""
        self._stop(None)

    def _stop(self, cause: BaseException | None) -> None:
        if not self._closed:
            self._closed, self._cause = True, cause
            self._groups, self._news = {}, []
            del self._samplers
            self._cache.pairs.clear()
            del self._runner  # its decode step holds the tensors, too

    def _require_alive(self) -> None:
        if self._closed:
            why = "it was closed" if self._cause is None else f"a step failed: {self._cause!r}"
            raise EngineDead(f"the engine has stopped: {why}; make a new one") from self._cause

    def check(self) -> None:
        """Assert the invariants of scheduler and pool. For tests."""
        self._scheduler.check()
        self._samplers.check({r.arrival for g in self._groups.values() for r in g.requests if not r.finished})
