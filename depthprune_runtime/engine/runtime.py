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
from depthprune_runtime.engine.kept_engine import KeptEngine
from depthprune_runtime.engine.loading import decoder_weights
from depthprune_runtime.engine.options import EngineFields, EngineOptions, engine_options
from depthprune_runtime.engine.outputs import OutputDelta, RequestOutput, RequestOutputs, StreamChunk
from depthprune_runtime.engine.params import SamplingFields, SamplingParams
from depthprune_runtime.engine.process import Process
from depthprune_runtime.engine.prompts import Prompt, listed
from depthprune_runtime.engine.values import boolean, refuse
from depthprune_runtime.errors import InputError
from depthprune_runtime.generation_config import generation_config
from depthprune_runtime.host.devices import may_round_activations, resolve_device, resolve_dtype
from depthprune_runtime.host.heap import return_free_heap
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.text.tokenizer import CHAT_OPTIONS, ChatFields, Tokenizer

_log = logging.getLogger("depthprune_runtime")


class ChatOptions(ChatFields, SamplingFields, total=False):
    """What `Runtime.chat` takes by keyword: what the template reads, and fields of `SamplingParams`."""


class Runtime:
    """A loaded model. `load` makes one.

    spec: its architecture; tokenizer: None if the checkpoint carries none, or it was to be left out;
    default_sampling_params: greedy, or what the model's own generation config asks for.

    Args:
        checkpoint: what to load.
        device: where to compute.
        dtype: to compute in.
        mmap: as in `load`.
        skip_tokenizer_init: as in `load`.
        activations: as in `load`.
        keep_prefixes: as in `load`.

    Raises:
        InputError: where the device or a choice will not do, or the checkpoint is damaged.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        mmap: bool = False,
        skip_tokenizer_init: bool = False,
        activations: str = "auto",
        keep_prefixes: bool = False,
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
        self._kept = KeptEngine(self.decoder, self._inputs, boolean("keep_prefixes", keep_prefixes))
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
        keep_prefixes: bool = False,
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
            keep_prefixes: let `generate`, `chat` and `stream` reuse keys and values of earlier calls where prompts
                begin alike, as those of a conversation do. Log-probabilities may then differ in their last bits from
                those of a first call, and so a choice between tokens that are almost equally likely.

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
        chosen = wanted or checkpoint.dtype
        return cls(checkpoint, target, chosen, mmap, skip_tokenizer_init, activations, keep_prefixes)

    def close(self) -> None:
        """Free the KV cache that `generate`, `chat` and `stream` keep between calls.

        The model stays loaded, and the next call makes a new cache. A call that runs meanwhile goes on, and frees its
        cache at its end. `with runtime:` closes it likewise; so does dropping the last reference to the runtime.
        """
        self._kept.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache that is kept between calls; 0 before the first and after `close`."""
        return self._kept.kv_cache_bytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.decoder.dtype

    def require_tokenizer(self, otherwise: str = "text cannot be used; give token ids") -> Tokenizer:
        """The tokenizer, for a caller that cannot do without.

        Args:
            otherwise: what is impossible without it, for the message.

        Returns:
            The tokenizer.

        Raises:
            InputError: if the checkpoint carries none, or it was left out.
        """
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

        An output that fails alone has finish_reason "error" and says why in `error`; the others are as ever.

        The KV cache is kept for the next call. It is as large as the largest call could use, and grows by being made
        anew; `close` frees it. A call that begins while another one or a `stream` runs has a cache of its own.

        Args:
            prompts: vLLM's dictionaries {"prompt": text} and {"prompt_token_ids": ids} count as a string and as ids.
            sampling_params: by default `default_sampling_params`.
            **options: fields of `SamplingParams` that replace those of sampling_params, such as `temperature=0.7`;
                `max_new_tokens` is another name of `max_tokens`.

        Returns:
            A list, one RequestOutput a prompt, that prints as the text.

        Raises:
            InputError: if all outputs fail; and, before anything runs, for what can never run.
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
        """Like `generate`, but gives the news of every output as it comes.

        A stream that is left before its end drops its requests: at `close` of the iterator, or when nobody holds it.

        Args:
            prompts: as in `generate`.
            sampling_params: as in `generate`.
            **options: as in `generate`.

        Returns:
            An iterator of chunks; each prints as its text.

        Raises:
            InputError: as in `generate`; for failed outputs behind the last chunk.
        """
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

        Special tokens in messages control the model, as those of the template do, unless split_special_tokens is set.

        Args:
            messages: as in `Tokenizer.apply_chat_template`, such as {"role": "user", "content": "Hello"}.
            sampling_params: as in `generate`.
            **options: those of `Tokenizer.apply_chat_template` (tools, continue_final_message, chat_template_kwargs,
                ...) and of `generate`.

        Returns:
            The output; its prompt is the rendered text.

        Raises:
            InputError: as in `generate`, and for messages that the template does not take.
        """
        tokenizer = self.require_tokenizer()
        chat = cast(ChatFields, {name: value for name, value in options.items() if name in CHAT_OPTIONS})
        sampling = {name: value for name, value in options.items() if name not in CHAT_OPTIONS}
        params = self._inputs.params(sampling_params or self.default_sampling_params, sampling)
        prompt, ids = tokenizer.encode_chat(messages, params.split_special_tokens, **chat)
        return dataclasses.replace(self.generate([ids], params)[0], prompt=prompt)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Next-token logits after every token, without a cache.

        Args:
            ids: token ids, shape [S] or [B, S], not empty.

        Returns:
            Shape [S, V] or [B, S, V], in the compute dtype.

        Raises:
            InputError: for ids that the model does not have, rows of unequal lengths, more tokens than its context, and
                behind a fork.
        """
        self._process.check(self.device)
        nested, found = self._inputs.id_rows(ids)
        rows = torch.tensor(found, dtype=torch.int64, device=self.device)  # [B, S]
        self._inputs.check_length(rows.shape[1], "ids", room=0)
        hidden = self.decoder.hidden_states(rows.flatten(), packed([rows.shape[1]] * rows.shape[0], self.device))
        logits = self.decoder.logits(hidden).view(*rows.shape, -1)
        return logits if nested else logits[0]

    def _groups(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None, options: Mapping[str, Any]
    ) -> list[RequestGroup]:
        """Requests whose ids are the numbers of their prompts."""
        named = listed(prompts)
        chosen = self._inputs.params(params or self.default_sampling_params, options)
        return [self._inputs.group(p, chosen, str(i), what=what) for i, (what, p) in enumerate(named)]

    def _run(self, groups: Sequence[RequestGroup]) -> Iterator[OutputDelta]:
        """Run everything to its end; raises InputError behind the last delta if every output has failed."""
        self._process.check(self.device)
        errors = []
        for delta in self._kept.run(groups):
            if delta.error is not None:
                errors.append(delta.error)
            yield delta
        if len(errors) == sum(len(group.requests) for group in groups):
            raise InputError(errors[0])
