"""Families of models: one file of data each, and one line here.

A family says how its config becomes a `DecoderSpec`, how its tensors are called and what is folded into them.
"""

from __future__ import annotations

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families.config import Config
from depthprune_runtime.families.decoder import family_spec
from depthprune_runtime.families.family import Family, Fold, Folds, GGUFForm
from depthprune_runtime.families.gemma2 import GEMMA2
from depthprune_runtime.families.gemma3 import GEMMA3
from depthprune_runtime.families.granite import GRANITE
from depthprune_runtime.families.llama import LLAMA
from depthprune_runtime.families.mistral import MISTRAL
from depthprune_runtime.families.names import GGUF_NAMES, HF_NAMES, Names, source_key, source_names, source_shapes
from depthprune_runtime.families.olmo2 import OLMO2
from depthprune_runtime.families.phi3 import PHI3
from depthprune_runtime.families.qwen2 import QWEN2
from depthprune_runtime.families.qwen3 import QWEN3
from depthprune_runtime.families.rope import rope_from_config, rope_to_config
from depthprune_runtime.families.seed_oss import SEED_OSS
from depthprune_runtime.families.smollm3 import SMOLLM3
from depthprune_runtime.spec import DecoderSpec

__all__ = [
    "FAMILIES",
    "GGUF_FAMILIES",
    "GGUF_NAMES",
    "HF_NAMES",
    "Config",
    "Family",
    "Fold",
    "Folds",
    "GGUFForm",
    "Names",
    "decoder_spec",
    "rope_from_config",
    "rope_to_config",
    "source_key",
    "source_names",
    "source_shapes",
]

_ALL = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    PHI3,
    GRANITE,
    SEED_OSS,
    OLMO2,
    GEMMA2,
    GEMMA3,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

GGUF_FAMILIES: dict[str, Family] = {family.gguf.architecture: family for family in _ALL if family.gguf is not None}


def decoder_spec(config: Config) -> DecoderSpec:
    """`DecoderSpec` of a dense model from its complete Hugging Face config.

    num_hidden_layers must have been compared with the files: a sub-layer is built for each.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise InputError(f"config.model_type: expected one of {sorted(FAMILIES)}, got {printable(repr(model_type))}")
    return family_spec(family, config)
