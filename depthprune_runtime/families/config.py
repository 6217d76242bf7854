"""What configs of all families share: sizes, sliding windows, the activation.

`config` is always a complete Hugging Face config dictionary (defaults filled in).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.spec import Activation

Config = Mapping[str, Any]

_MAX_SIZE = (1 << 31) - 1  # of a dimension or a context: what an int32 holds
_MAX_NUMBER = 1e18
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")


def check_sizes(config: Config) -> None:
    missing = [key for key in (*_SIZES, "rms_norm_eps") if key not in config]
    if missing:
        raise InputError(f"config has no key {missing[0]}")
    for key in (*_SIZES, *(k for k in _OPTIONAL_SIZES if config.get(k) is not None)):
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
            raise InputError(f"config.{key}: expected an integer from 1 to {_MAX_SIZE}, got {printable(repr(value))}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not config.get("head_dim") and width % heads:
        raise InputError(f"config.num_attention_heads: expected a divisor of hidden_size {width}, got {heads}")


def head_dim(config: Config) -> int:
    """Width of a head. The config's sizes must have been checked."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def layer_type(config: Config, block: int) -> str | None:
    """The config's type of `block`, `full_attention` or `sliding_attention`; None where it lists none."""
    count = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list | tuple) or len(types) != count:
        raise InputError(f"config.layer_types: expected a list of {count}, one a block")
    kind, known = types[block], ["full_attention", "sliding_attention"]
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"config.layer_types: expected {known}, got {printable(repr(kind))}")
    return kind


def window(config: Config, block: int) -> int | None:
    """Sliding window of `block`; Qwen lists block types, Mistral gives one window for all."""
    return None if layer_type(config, block) == "full_attention" else config.get("sliding_window")


def attention_bias(config: Config) -> bool:
    return bool(config.get("attention_bias", False))


_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(config: Config, key: str) -> Activation:
    """The FFN's activation, which the config has under `key`."""
    named = config.get(key, "silu")
    if not isinstance(named, str) or named not in _ACTIVATIONS:
        raise InputError(f"config.{key}: expected 'silu' or 'gelu_pytorch_tanh', got {printable(repr(named))}")
    return _ACTIVATIONS[named]


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive number of the config."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _MAX_NUMBER:
        raise InputError(f"config.{key}: expected a positive number, got {printable(repr(value))}")
    return float(value)
