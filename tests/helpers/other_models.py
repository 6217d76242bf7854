"""Small random models of the families that are no decoders of ours."""

from __future__ import annotations

import pico
import torch
from transformers import AutoConfig, AutoModelForCausalLM

BLOCKS = 5
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(0))
SIZES = {
    "mamba": {"state_size": 4, "n_layer": BLOCKS},  # converted checkpoints carry n_layer beside num_hidden_layers
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 8},
    "rwkv": {"intermediate_size": 40, "rescale_every": 0, "context_length": 64},
}


def build(family, **changes):
    """A random model whose blocks all matter."""
    values = {
        "vocab_size": pico.VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": BLOCKS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(values | SIZES[family] | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ("ln" in name and name.endswith("weight")):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2 and "A_log" not in name:
                parameter.normal_(0.0, 0.3)
    return model
