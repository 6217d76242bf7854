"""`Family`: what sets one `model_type` apart from Llama, as data and small functions of the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from depthprune_runtime.families.config import Config
from depthprune_runtime.families.names import GGUF_NAMES, HF_NAMES, Names
from depthprune_runtime.families.rope import rope_from_config
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec


@dataclass(frozen=True)
class Fold:
    """A tensor of the source becomes `(tensor + shift) * factor`, so that nothing later knows of either."""

    shift: float = 0.0
    factor: float = 1.0


Reader = Callable[[str], Any]  # metadata by name, None where there is none
Folds = Mapping[str, Fold]  # by the keys of a table of names


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    return plain


def _ffn(config: Config, plain: FFNSpec) -> FFNSpec:
    return plain


def _decoder(config: Config, plain: DecoderSpec) -> DecoderSpec:
    return plain


def _no_folds(config: Config) -> Folds:
    return {}


def _more(read: Reader, config: Config) -> Config:
    return {}


@dataclass(frozen=True)
class GGUFForm:
    """How llama.cpp stores a family.

    architecture: its name there; names: of tensors; interleaved: whether the rows of queries and keys are in
    interleaved rotary order; reads: optional metadata that `config` understands and that is refused otherwise; config:
    further keys of the Hugging Face config, from metadata by its name behind the architecture's and from the config so
    far; folded: whether what `Family.folds` folds is folded already.
    """

    architecture: str
    names: Names = field(default_factory=lambda: GGUF_NAMES)
    interleaved: bool = False
    reads: tuple[str, ...] = ()
    config: Callable[[Reader, Config], Config] = _more
    folded: bool = False


@dataclass(frozen=True)
class Family:
    """One family. What is not given is as in Llama.

    attention, ffn, decoder: from the parts as Llama has them to the family's; `origin[0]` is the block. rope: of the
    decoder. names, folds: of a Hugging Face folder. activation_key: the config's key. partial_rotary: whether the
    config may ask for heads that are rotated in part. gguf: None where GGUF files of it are not read.
    """

    model_type: str
    attention: Callable[[Config, AttentionSpec], AttentionSpec] = _attention
    ffn: Callable[[Config, FFNSpec], FFNSpec] = _ffn
    decoder: Callable[[Config, DecoderSpec], DecoderSpec] = _decoder
    rope: Callable[[Config], RopeSpec] = rope_from_config
    names: Names = field(default_factory=lambda: HF_NAMES)
    folds: Callable[[Config], Folds] = _no_folds
    activation_key: str = "hidden_act"
    partial_rotary: bool = False
    gguf: GGUFForm | None = None
