"""Pico models of every family, made by Transformers itself, with a small trained tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from depthprune_runtime.checkpoint import open_checkpoint, write_native

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What the configs of families have that Llama's has not, with values that change logits.
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 4.0,
    },
    "seed_oss": {},
    "olmo2": {},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 24},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
}
VOCAB_SIZE = 384
CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a decoder is a sequence of residual sub-layers",
    "naïve façade — 東京 🙂 emoji and accents",
    "prune the blocks that change the hidden state least",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a BOS that is added and an EOS that is not."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS * 8, trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)


def config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """9 heads on 3 KV heads, head_dim not hidden_size / heads: the shapes that trip implementations."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 72,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "qwen2":
        values |= {"num_attention_heads": 6, "num_key_value_heads": 3}  # this family has no head_dim of its own
        del values["head_dim"]
    if family == "phi3":  # its validation knows no head_dim either
        values |= {"hidden_size": 96, "num_attention_heads": 6}
        del values["head_dim"]
    values |= OWN.get(family, {})
    return AutoConfig.for_model(family, **(values | changes))


def build_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model whose norms, biases and logits are far from trivial."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model.to(dtype)


def save(model: Any, folder: Path, tokenizer: bool = True, **options: Any) -> Path:
    """Write `model` as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    if tokenizer:
        build_tokenizer().save_pretrained(folder)
    return folder


def save_damaged(folder: Path, path: Path, name: str, value: float) -> Path:
    """Our own file of the model in `folder`, with `value` first in packed tensor `name`; no import lets it through."""
    checkpoint = open_checkpoint(folder)
    healthy = checkpoint.tensor

    def damaged(wanted: str) -> torch.Tensor:
        tensor = healthy(wanted).clone()
        if wanted == name:
            tensor.view(-1)[0] = value
        return tensor

    checkpoint.tensor = damaged
    write_native(path, checkpoint)
    return path
