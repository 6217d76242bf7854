"""`Runtime`: load a checkpoint and generate with it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.engine.async_engine import AsyncEngine
from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.inputs import Inputs, RequestGroup
from depthprune_runtime.engine.kv_cache import kv_blocks_needed
from depthprune_runtime.engine.loading import decoder_weights
from depthprune_runtime.engine.memory import default_kv_memory, free_memory, kv_block_bytes
from depthprune_runtime.engine.options import KV_BLOCK_SIZE, EngineFields, EngineOptions, engine_options
from depthprune_runtime.engine.outputs import OutputDelta, RequestOutput, RequestOutputs, StreamChunk
from depthprune_runtime.engine.params import SamplingFields, SamplingParams
from depthprune_runtime.engine.process import Process
from depthprune_runtime.engine.prompts import Prompt, listed
from depthprune_runtime.engine.values import refuse, token_ids
from depthprune_runtime.errors import InputError
from depthprune_runtime.generation_config import generation_config
from depthprune_runtime.host.devices import may_round_activations, resolve_device, resolve_dtype
from depthprune_runtime.host.heap import return_free_heap
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.text.tokenizer import CHAT_OPTIONS, ChatFields, Tokenizer

_log = logging.getLogger("depthprune_runtime")

_MAX_RUNNING = 64  # outputs decoded together
_PREFILL_TOKENS = 4096  # tokens in one forward pass


class ChatOptions(ChatFields, SamplingFields, total=False):
    """What `Runtime.chat` takes by keyword: what the template reads, and fields of `SamplingParams`."""


class Runtime:
    """A loaded model.

    spec: its architecture; tokenizer: None if the checkpoint carries none, or it was to be left out;
    default_sampling_params: greedy, or what the model's own generation config asks for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        mmap: bool = False,
        skip_tokenizer_init: bool = False,
        activations: str = "auto",
    ) -> None:
        may_round = may_round_activations(activations, device, dtype)
        self.name = checkpoint.name
        self._process = Process(f"the model {checkpoint.name}")
        self.spec: DecoderSpec = checkpoint.spec
        self.plan: Mapping[str, Any] | None = checkpoint.plan
        self.provenance: Mapping[str, Any] = checkpoint.provenance
        self.tokenizer: Tokenizer | None = None
        skipped = False
        if "tokenizer.json" in checkpoint.assets:
            skipped = skip_tokenizer_init
            self.tokenizer = None if skipped else Tokenizer(checkpoint)
        config = generation_config(checkpoint)
        if skipped and config.get("eos_token_id") is None:
            _log.warning(
                "%s: without its tokenizer no end token is known, for its generation config names none; outputs end at "
                "stop_token_ids and max_tokens",
                self.name,
            )
        self._inputs = Inputs(self.name, self.spec, self.tokenizer, config, skipped)
        self.default_sampling_params = self._inputs.default_sampling_params
        self.decoder = Decoder(self.spec, decoder_weights(checkpoint, device, dtype, mmap, may_round), device, dtype)
        return_free_heap()

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        verify: bool = True,
        mmap: bool = False,
        skip_tokenizer_init: bool = False,
        activations: str = "auto",
    ) -> Runtime:
        """Load our own file, a Hugging Face folder or hub id, or a GGUF file.

        Args:
            model: the file, folder or hub id.
            device: `auto` is CUDA where there is one.
            dtype: to compute in; `auto` is the checkpoint's.
            verify: check our own file against its checksums.
            mmap: on a CPU, leave the weights of our own file mapped, so that processes share them. By default they are
                copied into huge pages and the layout that the kernels read fastest.
            skip_tokenizer_init: leave the tokenizer out, for callers that have their own. Prompts are then token ids,
                outputs have no text, and only the `eos_token_id` of the generation config ends them unasked.
            activations: what meets a weight of 8 or 4 bits. `int8`, on a CPU the default, rounds it to 8 bits (W8A8,
                W4A8). The name of the model's dtype, such as `bf16`, keeps it as it is (W8A16, W4A16). On a CPU that is
                several times slower.

        Returns:
            The loaded model.

        Raises:
            InputError: where the source, the device or a choice will not do.
        """
        if not isinstance(model, str | os.PathLike) or not str(model):
            refuse("model", "a file, a folder or a hub id", model)
        wanted = resolve_dtype(dtype)
        target = resolve_device(device)
        checkpoint = open_checkpoint(model, wanted, verify)
        return cls(checkpoint, target, wanted or checkpoint.dtype, mmap, skip_tokenizer_init, activations)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def require_tokenizer(self, otherwise: str = "text cannot be used; give token ids") -> Tokenizer:
        """The tokenizer. Raises InputError if there is none; otherwise: what is impossible then, for the message."""
        return self._inputs.require_tokenizer(otherwise)

    def engine(self, options: EngineOptions | None = None, **fields: Unpack[EngineFields]) -> Engine:
        """An engine over this model, for serving.

        Args:
            options: its sizes and limits; by default those of `EngineOptions()`.
            **fields: fields of `EngineOptions` that replace those of `options`, such as `max_num_seqs=8`.

        Returns:
            The engine, with a KV cache of its own.

        Raises:
            InputError: for options out of range, a KV cache that does not fit into memory, and behind a fork.
        """
        self._process.check(self.device)
        return Engine(self.decoder, self._inputs, engine_options(options, fields))

    def async_engine(self, options: EngineOptions | None = None, **fields: Unpack[EngineFields]) -> AsyncEngine:
        """An engine of many callers over this model, with a thread of its own. Arguments and errors are `engine`'s.

        Args:
            options: as in `engine`.
            **fields: as in `engine`.

        Returns:
            The engine; its thread runs until `close` or `shutdown`.

        Raises:
            InputError: as in `engine`.
        """
        return AsyncEngine(self.engine(options, **fields))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        **options: Unpack[SamplingFields],
    ) -> RequestOutputs:
        """Generate from a string, token ids, or a list of either, of any lengths.

        prompts: vLLM's dictionaries {"prompt": text} and {"prompt_token_ids": ids} count as a string and as token ids;
        sampling_params: defaults to `default_sampling_params`; options: its fields by keyword, such as
        `temperature=0.7`; `max_new_tokens` is another name of `max_tokens`. Returns a list, one
        RequestOutput a prompt, that prints as the text.

        An output that fails alone has finish_reason "error" and says why in `error`; the others are as ever. Raises
        InputError if all fail, and for what can never run, before anything runs.
        """
        groups = self._groups(prompts, sampling_params, options)
        done = {d.result.request_id: d.result for d in self._run(groups) if d.result is not None}
        return RequestOutputs(done[group.request_id] for group in groups)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        **options: Unpack[SamplingFields],
    ) -> Iterator[StreamChunk]:
        """Like `generate`, but yields the news of every output as it comes; a chunk prints as its text."""
        return self._stream(self._groups(prompts, sampling_params, options))

    def _stream(self, groups: Sequence[RequestGroup]) -> Iterator[StreamChunk]:
        pending: dict[tuple[int, int], tuple[int, ...]] = {}  # ids whose text is not complete yet
        for delta in self._run(groups):
            key = (int(delta.request_id), delta.output_index)
            ids = pending.pop(key, ()) + delta.token_ids
            if delta.text or delta.finish_reason is not None:
                yield StreamChunk(*key, delta.text, ids, delta.finish_reason, delta.error)
            else:
                pending[key] = ids

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> RequestOutput:
        """Answer a conversation, rendered with the model's own chat template.

        options: those of `Tokenizer.apply_chat_template` (tools, continue_final_message, chat_template_kwargs, ...) and
        of `generate`. Special tokens in messages control the model, as those of the template do, unless
        split_special_tokens is set.
        """
        tokenizer = self.require_tokenizer()
        chat = cast(ChatFields, {name: value for name, value in options.items() if name in CHAT_OPTIONS})
        sampling = {name: value for name, value in options.items() if name not in CHAT_OPTIONS}
        params = self._inputs.params(sampling_params or self.default_sampling_params, sampling)
        prompt, ids = tokenizer.encode_chat(messages, params.split_special_tokens, **chat)
        return dataclasses.replace(self.generate([ids], params)[0], prompt=prompt)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:  # [S] -> [S, V], or [B, S] -> [B, S, V]
        """Next-token logits after every token, in the compute dtype, without a cache."""
        self._process.check(self.device)
        tokens = self._id_tensor(ids)
        rows = tokens if tokens.dim() == 2 else tokens[None]
        self._inputs.check_length(rows.shape[1], "ids", room=0)
        hidden = self.decoder.hidden_states(rows.flatten(), packed([rows.shape[1]] * rows.shape[0], self.device))
        return self.decoder.logits(hidden).view(*tokens.shape, -1)

    def _id_tensor(self, ids: Any) -> Tensor:  # [S] or [B, S], int64
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        nested = isinstance(values, list | tuple) and len(values) > 0 and isinstance(values[0], Sequence)
        if nested and not isinstance(values[0], str | bytes):
            rows = [token_ids(f"ids[{i}]", row, self.spec.vocab_size) for i, row in enumerate(values)]
        else:
            nested, rows = False, [token_ids("ids", values, self.spec.vocab_size)]
        if not rows[0] or len(set(map(len, rows))) > 1:
            refuse("ids", "shape [S] or [B, S], not empty", [len(row) for row in rows])
        tokens = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return tokens if nested else tokens[0]

    def _groups(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None, options: Mapping[str, Any]
    ) -> list[RequestGroup]:
        """Requests whose ids are the numbers of their prompts."""
        named = listed(prompts)
        chosen = self._inputs.params(params or self.default_sampling_params, options)
        return [self._inputs.group(p, chosen, str(i), what=what) for i, (what, p) in enumerate(named)]

    def _run(self, groups: Sequence[RequestGroup]) -> Iterator[OutputDelta]:
        """Run everything to its end; raises InputError behind the last delta if every output has failed."""
        engine = self.engine(
            kv_memory=self._kv_memory(groups),
            max_num_seqs=_MAX_RUNNING,
            max_num_batched_tokens=max(_PREFILL_TOKENS, _MAX_RUNNING),
            max_waiting=None,
        )
        for group in groups:
            engine.add(group)
        errors = []
        while engine.has_unfinished():
            for delta in engine.step():
                if delta.error is not None:
                    errors.append(delta.error)
                yield delta
        if len(errors) == sum(len(group.requests) for group in groups):
            raise InputError(errors[0])

    def _kv_memory(self, groups: Sequence[RequestGroup]) -> int:
        """Bytes that the largest outputs running together need, one kv_block each to spare, up to the default."""
        needs = sorted(kv_blocks_needed(r.max_cached_tokens, KV_BLOCK_SIZE) + 1 for g in groups for r in g.requests)
        wanted = sum(needs[-_MAX_RUNNING:]) * kv_block_bytes(self.spec, KV_BLOCK_SIZE, self.dtype)
        free = free_memory(self.device)
        return wanted if free is None else min(wanted, int(default_kv_memory(self.device) * free))
