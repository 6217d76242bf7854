"""Models of bench_gpu.py: shapes of public ones with random weights, made on the device.

One pool of random numbers holds the weights of all variants and of Transformers: they never run at the same time, and
every tensor is read from DRAM whoever else reads it later. So dense, pruned and peer take the memory of one model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peers.weights import Model, huggingface_config, unpacked
from public_models import SPECS as PUBLIC
from public_models import llama, shortened
from torch import Tensor

from depthprune_runtime.families import HF_NAMES
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.pruning.surgery import pruned_spec
from depthprune_runtime.spec import DecoderSpec

_ALIGNMENT = 128  # elements: where an allocation of its own would begin


def _plans(name: str, pairs: int) -> Model:
    """A quarter of the blocks dropped; a quarter of the sub-layers, twice as much attention as FFNs, as FinerCut
    tends to; `pairs` merged, which narrowed are a fifth of all parameters. Late ones, as the methods choose; which of
    equal blocks go means nothing to speed."""
    blocks = block_pairs(SPECS[name])
    last = len(blocks) - 2
    drop, half = len(blocks) // 4, len(blocks) // 2
    attention = round(len(blocks) / 3)
    chosen = [index for index, _ in blocks[last - attention : last]]
    chosen += [index for _, index in blocks[last - (half - attention) : last]]
    return Model(
        name,
        tokens=64,
        shortgpt=tuple(range(last - drop, last)),
        finercut=tuple(sorted(chosen)),
        flattengpt=tuple(range(last - 2 * pairs, last, 2)),
    )


# A quarter of Llama-2-70B's depth: 35 GB, so that one device holds it beside its caches. What a fifth less of it gains
# stands for the whole, except that the head weighs four times as much.
SPECS = {name: PUBLIC[name] for name in ("llama-2-7b", "llama-2-13b", "llama-3-8b")} | {
    "llama-2-70b/4": shortened(PUBLIC["llama-2-70b"], blocks=60),
    "tiny": llama(8, 64, 4, 2, 96, 128, 10000.0, 4096),  # for a dry run
}
PLANS = {
    "llama-2-7b": _plans("llama-2-7b", 7),
    "llama-2-13b": _plans("llama-2-13b", 9),
    "llama-3-8b": _plans("llama-3-8b", 8),
    "llama-2-70b/4": _plans("llama-2-70b/4", 4),
    "tiny": _plans("tiny", 2),
}


def variant_spec(model: str, variant: str) -> DecoderSpec:
    """What a method leaves of `model`; `dense` is all."""
    spec = SPECS[model]
    if variant == "dense":
        return spec
    return pruned_spec(spec, PrunePlan(variant.split(maxsplit=1)[0], "0" * 64, PLANS[model].plans(spec)[variant]))


def _offsets(spec: DecoderSpec) -> tuple[dict[str, int], int]:
    """Where each matrix begins in the pool, and how many elements they take."""
    found, total = {}, 0
    for name, shape in spec.tensor_shapes().items():
        if len(shape) > 1:
            found[name] = total
            total += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return found, total


@dataclass(frozen=True)
class Source:
    """The tensors of `spec` as views of the pool; norms are ones."""

    spec: DecoderSpec
    pool: Tensor

    def tensor(self, name: str) -> Tensor:
        shape = self.spec.tensor_shapes()[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.pool.dtype, device=self.pool.device)
        start = _offsets(self.spec)[0][name]
        return self.pool[start : start + math.prod(shape)].view(shape)

    def decoder(self) -> Decoder:
        return Decoder(self.spec, self.tensor, self.pool.device, self.pool.dtype)


def make_pool(model: str, variants: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random numbers enough for every variant."""
    size = max(_offsets(variant_spec(model, v))[1] for v in ("dense", *variants))
    pool = torch.empty(size, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for part in pool.split(1 << 28):
        part.normal_(0.0, 0.02, generator=generator)
    return pool


def transformers_model(source: Source) -> Any:
    """LlamaForCausalLM of a dense spec over the same memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = huggingface_config(source.spec)
    values["eos_token_id"] = None  # runs to the last token, without a processor that forbids the end
    config = AutoConfig.for_model(**{k: v for k, v in values.items() if k not in ("architectures", "torch_dtype")})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=source.pool.dtype, attn_implementation="sdpa")
    model.load_state_dict(dict(unpacked(source, HF_NAMES)), assign=True)
    # its frequencies are no parameter: they are still on the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(source.pool.device)
    return model.eval().requires_grad_(False)
