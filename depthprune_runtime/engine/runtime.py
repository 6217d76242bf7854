"""`Runtime`: load a checkpoint and generate with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.engine.kv_cache import KVCache, consecutive_tables
from depthprune_runtime.engine.outputs import Logprob, RequestOutput, RequestOutputs, StreamChunk
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.runner import Runner
from depthprune_runtime.engine.sampler import RequestSampler, sample_batch, top_logprobs
from depthprune_runtime.errors import InputError
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.placement import resolve_device, resolve_dtype
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.tokenizer import Tokenizer, generation_config

Prompt = str | Sequence[int]
_KV_BLOCK_SIZE = 16  # tokens
_DEFAULT_NEW_TOKENS = 128
_MAX_RUNNING = 64  # outputs decoded together
_PREFILL_TOKENS = 4096  # prompt tokens in one forward pass, unless a single prompt is longer


class Runtime:
    """A loaded model.

    spec: its architecture; tokenizer: None if the checkpoint carries none; default_sampling_params:
    greedy, or what the model's own generation config asks for.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.name = checkpoint.name
        self.spec: DecoderSpec = checkpoint.spec
        self.plan: Mapping[str, Any] | None = checkpoint.plan
        self.provenance: Mapping[str, Any] = checkpoint.provenance
        self.tokenizer: Tokenizer | None = None
        if "tokenizer.json" in checkpoint.assets:
            self.tokenizer = Tokenizer(checkpoint)
        config = generation_config(checkpoint)
        self._eos_ids = _eos_ids(config, self.tokenizer)
        self.default_sampling_params = _default_params(config)
        self.decoder = Decoder(self.spec, checkpoint.tensor, device, dtype)

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        verify: bool = True,
    ) -> Runtime:
        """Load our own file, a Hugging Face folder or hub id, or a GGUF file.

        device: `auto` is CUDA where there is one; dtype: `auto` is the checkpoint's (weights of our own file
        then stay mapped on a CPU, without a copy); verify: check our own file against its checksums.
        """
        wanted = resolve_dtype(dtype)
        target = resolve_device(device)
        checkpoint = open_checkpoint(model, wanted, verify)
        return cls(checkpoint, target, wanted or checkpoint.dtype)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> RequestOutputs:
        """Generate from a string, token ids, or a list of either, of any lengths.

        sampling_params: defaults to `default_sampling_params`; options: its fields by keyword, such as
        `temperature=0.7`; `max_new_tokens` is another name of `max_tokens`. Returns a list, one
        RequestOutput a prompt, that prints as the text.
        """
        encoded = self._encode_all(prompts)
        params = self._params(sampling_params, options)
        requests = self._requests(encoded, params)
        for _ in self._run(requests):
            pass
        outputs = RequestOutputs()
        for i, (prompt, ids) in enumerate(encoded):
            done = tuple(r.output() for r in requests if r.prompt_index == i)
            outputs.append(RequestOutput(str(i), prompt, tuple(ids), done, finished=True))
        return outputs

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[StreamChunk]:
        """Like `generate`, but yields the news of every output as it comes; a chunk prints as its text."""
        encoded = self._encode_all(prompts)
        return self._stream(self._requests(encoded, self._params(sampling_params, options)))

    def _stream(self, requests: Sequence[Request]) -> Iterator[StreamChunk]:
        sent: dict[tuple[int, int], int] = {}
        for request in self._run(requests):
            key = (request.prompt_index, request.output_index)
            text = request.take_news()
            if text or request.finished:
                new_ids = tuple(request.output_ids[sent.get(key, 0) :])
                sent[key] = len(request.output_ids)
                yield StreamChunk(*key, text, new_ids, request.finish_reason)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> RequestOutput:
        """Answer a conversation, rendered with the model's own chat template."""
        tokenizer = self._require_tokenizer()
        prompt = tokenizer.apply_chat_template(messages)
        ids = tokenizer.encode(prompt, add_special_tokens=False)  # the template writes them itself
        output = self.generate([ids], sampling_params, **options)[0]
        return dataclasses.replace(output, prompt=prompt)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:  # [S] -> [S, V], or [B, S] -> [B, S, V]
        """Next-token logits after every token, in the compute dtype, without a cache."""
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        if tokens.dim() not in (1, 2) or tokens.numel() == 0:
            raise InputError(f"ids: expected shape [S] or [B, S], not empty, got {list(tokens.shape)}")
        rows = tokens if tokens.dim() == 2 else tokens[None]
        self._check_ids(rows.flatten().tolist(), "ids")
        self._check_length(rows.shape[1], "ids", room=0)
        hidden = self.decoder.hidden_states(rows.flatten(), packed([rows.shape[1]] * rows.shape[0], self.device))
        return self.decoder.logits(hidden).view(*tokens.shape, -1)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{self.name}: it carries no tokenizer, so text cannot be used; give token ids")
        return self.tokenizer

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        wrong = next((i for i in ids if not 0 <= i < self.spec.vocab_size), None)
        if wrong is not None:
            raise InputError(f"{what}: expected token ids below {self.spec.vocab_size}, got {wrong}")

    def _check_length(self, length: int, what: str, room: int) -> None:
        most = self.spec.max_position_embeddings - room
        if length > most:
            raise InputError(
                f"{what}: expected at most {most} tokens (the model's context is "
                f"{self.spec.max_position_embeddings}), got {length}; shorten it"
            )

    def _encode_all(self, prompts: Prompt | Sequence[Prompt]) -> list[tuple[str | None, list[int]]]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int) for p in prompts))
        listed: Sequence[Any] = [prompts] if single else prompts
        if not listed:
            raise InputError("prompts: expected at least one prompt, got none")
        encoded: list[tuple[str | None, list[int]]] = []
        for i, prompt in enumerate(listed):
            what = "prompt" if len(listed) == 1 else f"prompts[{i}]"
            ids = self._require_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise InputError(f"{what}: empty; expected at least one token")
            if not all(isinstance(t, int) for t in ids):
                raise InputError(f"{what}: expected a string or a sequence of token ids, got {type(prompt).__name__}")
            self._check_ids(ids, what)
            self._check_length(len(ids), what, room=1)
            encoded.append((prompt if isinstance(prompt, str) else None, ids))
        return encoded

    def _params(self, params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
        options = dict(options)
        if "max_new_tokens" in options:
            options["max_tokens"] = options.pop("max_new_tokens")
        known = {f.name for f in dataclasses.fields(SamplingParams)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise InputError(f"unknown options {unknown}; known are {sorted(known)} and max_new_tokens")
        chosen = dataclasses.replace(params or self.default_sampling_params, **options)
        if chosen.stop and self.tokenizer is None:
            raise InputError(f"stop: {self.name} carries no tokenizer; use stop_token_ids")
        return chosen

    def _requests(self, encoded: list[tuple[str | None, list[int]]], params: SamplingParams) -> list[Request]:
        return [
            Request(
                i,
                output_index,
                ids,
                params,
                self._eos_ids,
                self.spec.max_position_embeddings,
                None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens),
            )
            for i, (_, ids) in enumerate(encoded)
            for output_index in range(params.n)
        ]

    def _run(self, requests: Sequence[Request]) -> Iterator[Request]:
        """Run everything to its end; yield a request each time it has a new token."""
        for first in range(0, len(requests), _MAX_RUNNING):
            yield from self._run_group(requests[first : first + _MAX_RUNNING])

    def _run_group(self, group: Sequence[Request]) -> Iterator[Request]:
        # inference mode is entered step by step: a generator must not leave it on in its caller
        with torch.inference_mode():
            room = [len(r.prompt_ids) + r.max_new_tokens for r in group]
            tables, total = consecutive_tables(room, _KV_BLOCK_SIZE)
            cache = KVCache(self.spec, total, _KV_BLOCK_SIZE, self.device, self.dtype)
            runner = Runner(self.decoder, cache, tables)
            samplers = [RequestSampler(r.params, r.prompt_ids, r.output_index, self.device) for r in group]
        for part in _prefill_parts(group):
            with torch.inference_mode():
                logits = runner.step(part, [group[i].prompt_ids for i in part], [0] * len(part))
                self._append(group, part, logits, samplers)
            yield from (group[i] for i in part)
        while running := [i for i, r in enumerate(group) if not r.finished]:
            with torch.inference_mode():
                logits = runner.step(
                    running, [group[i].output_ids[-1:] for i in running], [group[i].num_tokens - 1 for i in running]
                )
                self._append(group, running, logits, samplers)
            yield from (group[i] for i in running)

    def _append(
        self, group: Sequence[Request], rows: Sequence[int], logits: Tensor, samplers: Sequence[RequestSampler]
    ) -> None:
        tokens = sample_batch(logits, [samplers[i] for i in rows])
        for i, token, row in zip(rows, tokens, logits, strict=True):
            request = group[i]
            alternatives = None
            if request.params.logprobs is not None:
                found = top_logprobs(row, token, request.params.logprobs)
                alternatives = {t: Logprob(value, rank, self._token_text(t)) for t, value, rank in found}
            request.append(token, alternatives)

    def _token_text(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)


def _prefill_parts(group: Sequence[Request]) -> Iterator[list[int]]:
    """Indices of prompts that are prefilled together."""
    part: list[int] = []
    tokens = 0
    for i, request in enumerate(group):
        if part and tokens + len(request.prompt_ids) > _PREFILL_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += len(request.prompt_ids)
    yield part


def _eos_ids(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> frozenset[int]:
    stated = config.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    if tokenizer is not None:
        ids = list(itertools.chain(ids, [tokenizer.special_token_id("eos_token")]))
    return frozenset(i for i in ids if isinstance(i, int))


def _default_params(config: Mapping[str, Any]) -> SamplingParams:
    """The model's generation config where it asks for sampling, else greedy."""
    if not config.get("do_sample"):
        penalty = config.get("repetition_penalty")
        return SamplingParams(temperature=0.0, max_tokens=_DEFAULT_NEW_TOKENS, repetition_penalty=penalty or 1.0)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    stated = {n: config[n] for n in names if config.get(n) is not None}
    return SamplingParams(max_tokens=_DEFAULT_NEW_TOKENS, **stated)
