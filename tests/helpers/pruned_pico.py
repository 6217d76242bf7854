"""Pruned pico models of every shape that a plan can make, as files of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pico
import torch

from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.plan import Drop, Edit, Flatten, Narrow, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Shape:
    """A family, what its config says besides, and the edits. Sub-layer 2 b is block b's attention, 2 b + 1 its FFN."""

    family: str
    edits: tuple[Edit, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "uniform": Shape("llama", (Drop(4), Drop(5))),
    "tied": Shape("llama", (Drop(4), Drop(5)), {"tie_word_embeddings": True}),
    "rope": Shape("llama", (Drop(4), Drop(5)), {"rope_parameters": _LLAMA3}),
    "window": Shape("mistral", (Drop(4), Drop(5))),
    "bias": Shape("qwen2", (Drop(4), Drop(5))),
    "qk_norm": Shape("qwen3", (Drop(4), Drop(5))),
    "attention_only": Shape("llama", (Drop(3), Drop(5), Drop(11))),
    "ffn_only": Shape("llama", (Drop(0), Drop(4), Drop(10)), {"tie_word_embeddings": True}),
    "ffns_first": Shape("llama", (Drop(0), Drop(2), Drop(7)), {"rope_parameters": _LLAMA3}),
    "widths": Shape("llama", (Drop(9), Narrow(2, (0, 2)), Narrow(4, (1,)), Narrow(5, tuple(range(48))))),
    "wide": Shape("llama", (Flatten((1, 2)), Drop(11))),
    "wide_uniform": Shape("llama", tuple(Flatten((b, b + 1)) for b in (0, 2, 4))),
    "irregular_bias": Shape("qwen2", (Drop(1), Drop(6), Narrow(9, tuple(range(40))))),
    "all_biases": Shape("llama", (Drop(2), Drop(9)), {"attention_bias": True}),
    "irregular_window": Shape("mistral", (Drop(3), Drop(6))),
    "some_windows": Shape(
        "qwen3", (Drop(3),), {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3}
    ),
    "irregular_qk_norm": Shape("qwen3", (Drop(3), Drop(8))),
    "wide_qk_norm": Shape("qwen3", (Flatten((1, 2)), Drop(0))),
}
UNIFORM = ("uniform", "tied", "rope", "window", "bias", "qk_norm")


def write(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model of shape `name`, as a file in `folder`, with the pico tokenizer in it."""
    shape = SHAPES[name]
    changes = {"num_hidden_layers": 6, "max_position_embeddings": 128, **shape.changes}
    source = pico.save(pico.build_model(shape.family, dtype, **changes), folder / f"{name}-dense")
    parent = open_checkpoint(source)
    plan = PrunePlan("finercut", parent.digest(), shape.edits)
    path = folder / f"{name}.safetensors"
    write_native(path, PrunedCheckpoint(parent, plan))
    return path
