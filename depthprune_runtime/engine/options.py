"""`EngineOptions`: how much an engine may hold and do at once. Names and defaults follow vLLM. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from depthprune_runtime.engine.params import MAX_OUTPUTS
from depthprune_runtime.engine.values import as_integer, boolean, integer, refuse
from depthprune_runtime.errors import InputError
from depthprune_runtime.host.sizes import size_in_bytes

KVMemory = int | float | str
KV_BLOCK_SIZE = 16  # tokens
_MAX_SEQS = 2**16
_MAX_COUNT = 2**31 - 1
_KV_MEMORY = "bytes (2147483648 or '2GiB') or a fraction in (0, 1] of the device's free memory"


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of an engine. Values out of range are refused with InputError.

    Args:
        kv_memory: of the KV cache: bytes (an int, or text such as "2GiB"), or a fraction in (0, 1] of the device's free
            memory. None is 0.9 of a GPU's, 0.5 of a CPU's. Never more is taken than `max_num_seqs` full contexts need.
        kv_block_size: tokens in a page of the cache, 1 to 65536.
        max_num_seqs: outputs running at once, 1 to 65536.
        max_num_batched_tokens: tokens computed in a step, prompts in chunks; at least max_num_seqs.
        max_waiting: outputs in the waiting queue, None for any number.
        enable_prefix_caching: reuse keys and values of equal beginnings.
        decode_steps: tokens a request that may be computed before the engine looks at them; an engine takes at most 16.
            It does so while none waits and all are greedy or (on a GPU) sampled without filters, penalties and
            log-probabilities. Their deltas come in bursts of as many. On a CPU a burst ends with the first request that
            does, and after 20 ms.
        max_n: outputs of one prompt that a request may ask for; at most max_waiting, too.
        max_logprobs: alternatives reported with each token that a request may ask for.
    """

    kv_memory: KVMemory | None = None
    kv_block_size: int = KV_BLOCK_SIZE
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_waiting: int | None = 1024
    enable_prefix_caching: bool = True
    decode_steps: int = 8
    max_n: int = 128
    max_logprobs: int = 20

    def __post_init__(self) -> None:
        seqs = integer("max_num_seqs", self.max_num_seqs, 1, _MAX_SEQS)
        tokens = integer("max_num_batched_tokens", self.max_num_batched_tokens, seqs, _MAX_COUNT, " (max_num_seqs)")
        waiting = self.max_waiting
        checked = {
            "kv_memory": None if self.kv_memory is None else _kv_memory(self.kv_memory),
            "kv_block_size": integer("kv_block_size", self.kv_block_size, 1, _MAX_SEQS),
            "max_num_seqs": seqs,
            "max_num_batched_tokens": tokens,
            "max_waiting": None if waiting is None else integer("max_waiting", waiting, 1, _MAX_COUNT),
            "enable_prefix_caching": boolean("enable_prefix_caching", self.enable_prefix_caching),
            "decode_steps": integer("decode_steps", self.decode_steps, 1, _MAX_COUNT),
            "max_n": integer("max_n", self.max_n, 1, MAX_OUTPUTS),
            "max_logprobs": integer("max_logprobs", self.max_logprobs, 0, _MAX_COUNT),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


class EngineFields(TypedDict, total=False):
    """The fields of `EngineOptions`, all optional: its keyword arguments where a call takes them."""

    kv_memory: KVMemory | None
    kv_block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int | None
    enable_prefix_caching: bool
    decode_steps: int
    max_n: int
    max_logprobs: int


def engine_options(options: EngineOptions | None, changes: Mapping[str, object]) -> EngineOptions:
    """`options`, or the defaults, with some fields changed; validated anew.

    Args:
        options: None for the defaults.
        changes: field -> its value.

    Returns:
        The options, or a changed copy.

    Raises:
        InputError: for what is no EngineOptions, a name that is no field, or a value out of range.
    """
    if options is not None and not isinstance(options, EngineOptions):
        refuse("options", "EngineOptions", options)
    known = [f.name for f in dataclasses.fields(EngineOptions)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise InputError(f"unknown engine options {unknown}; known are {known}")
    return dataclasses.replace(options or EngineOptions(), **changes)  # type: ignore[arg-type]  # it checks the values


def _kv_memory(memory: object) -> int | float:
    """Bytes as an int, or a fraction as a float."""
    if isinstance(memory, float) and 0.0 < memory <= 1.0:
        return memory
    size = size_in_bytes(memory) if isinstance(memory, str) else as_integer(memory)
    if size is None or size < 0:
        refuse("kv_memory", _KV_MEMORY, memory)
    return size
