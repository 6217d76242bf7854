"""`Request`: one running output, from its prompt to its end. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from depthprune_runtime.engine.kv_blocks import BlockTable
from depthprune_runtime.engine.outputs import CompletionOutput, FinishReason, Logprob
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.stop_strings import StopStrings


class TextSource(Protocol):
    """Turns ids into text as they come (`tokenizer.TextStream`)."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Request:
    """State of one output.

    request_id, output_index: whose output it is; prompt_ids: the prompt's tokens; params: how to sample; eos_ids: ids
    that end it; max_length: prompt and output together, by the model's context; text: None where the checkpoint has
    no tokenizer; priority: lower is sooner; stops: what finds the stop strings, None if there are none; stop_tokens: id
    -> stop string, of special tokens that are left out of the text and end it as stop strings. end_ids: every token
    that ends it; bad_words: token ids of each.

    The scheduler's part: arrival (its number, unique), key (its place in line), table and num_computed (tokens whose
    keys and values are in the cache), seat (its row among the running), blocked_at (see `Scheduler`).
    """

    def __init__(
        self,
        request_id: str,
        output_index: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_ids: frozenset[int],
        max_length: int,
        text: TextSource | None,
        priority: int = 0,
        stops: StopStrings | None = None,
        stop_tokens: Mapping[int, str] = MappingProxyType({}),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        self.request_id = request_id
        self.output_index = output_index
        self.priority = priority
        self.params = params
        self.token_ids = list(prompt_ids)  # prompt, then output
        self.num_prompt_tokens = len(self.token_ids)
        room = max_length - self.num_prompt_tokens
        self.max_new_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self.bad_words = bad_words
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.num_cached_tokens = 0  # of the prompt, when it was first admitted
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._stop_ids = frozenset(params.stop_token_ids)
        self._stop_tokens = stop_tokens
        self.end_ids = sorted(self._eos_ids | self._stop_ids | stop_tokens.keys())
        self._stops = stops
        self._stop_state = 0
        self._source = text
        self._sent: list[str] = []  # text handed out
        self._unsent = ""

        self.arrival = -1
        self.key = (0, 0)
        self.table: BlockTable | None = None
        self.num_computed = 0
        self.seat = -1
        self.blocked_at = -1

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[: self.num_prompt_tokens])

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_cached_tokens(self) -> int:
        """Tokens in the cache at its longest; the last token of an output is never fed back."""
        return self.num_prompt_tokens + self.max_new_tokens - 1

    @property
    def text(self) -> str:
        return "".join(self._sent) + self._unsent

    def append(self, token_id: int, alternatives: dict[int, Logprob] | None = None) -> None:
        """Take one sampled token and decide whether the output ends with it."""
        self.token_ids.append(token_id)
        if alternatives is not None and self.cumulative_logprob is not None:
            self.logprobs.append(alternatives)
            self.cumulative_logprob += alternatives[token_id].logprob
        if token_id in self._eos_ids:
            self._finish("stop", None, flush=True)
        elif token_id in self._stop_ids:
            self._finish("stop", token_id, flush=True)
        elif token_id in self._stop_tokens:
            self._finish("stop", self._stop_tokens[token_id], flush=True)
            if self.params.include_stop_str_in_output and self.stop_reason == self._stop_tokens[token_id]:
                self._unsent += self._stop_tokens[token_id]
        else:
            stopped = self._source is not None and self._write(self._source.push(token_id))
            if not stopped and self.num_output_tokens >= self.max_new_tokens:
                self._finish("length", None, flush=True)

    def abort(self) -> None:
        """End it as the caller wishes; its text so far stays."""
        self._finish("abort", None, flush=False)

    def fail(self, message: str) -> None:
        """End it because of `message`; its text so far stays."""
        self.error = message
        self._finish("error", None, flush=False)

    def _finish(self, reason: FinishReason, stop: int | str | None, flush: bool) -> None:
        self.finish_reason = reason
        self.stop_reason = stop
        if flush and self._source is not None:
            self._write(self._source.flush())

    def _write(self, piece: str) -> bool:
        """Take one more piece of text; whether a stop string ends the output in it."""
        before = len(self._unsent)
        self._unsent += piece
        if self._stops is None:
            return False
        self._stop_state, match = self._stops.scan(self._stop_state, piece)
        if match is None or (0 < self.num_output_tokens <= self.params.min_tokens):
            return False
        end = before + match.start + (len(match.stop) if self.params.include_stop_str_in_output else 0)
        self._unsent = self._unsent[:end]
        self._finish("stop", match.stop, flush=False)
        return True

    def take_news(self) -> str:
        """Text not yet handed out; a tail that may become a stop string waits until that is decided."""
        held = 0 if self.finished or self._stops is None else self._stops.held(self._stop_state)
        end = len(self._unsent) - held
        news, self._unsent = self._unsent[:end], self._unsent[end:]
        if news:
            self._sent.append(news)
        return news

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.output_index,
            text=self.text,
            token_ids=tuple(self.output_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )
