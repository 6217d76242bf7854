"""Options of healing: frozen, validated, with their defaults and presets. Imports no torch.

Where the defaults come from: `rank` 8, `learning_rate` 1e-4 and `epochs` 2 are the recovery of the FlattenGPT paper
(arXiv 2602.08858), which trains LoRA on all linear layers. `alpha` 16 is the usual twice the rank; the paper names
none. The other numbers are ours.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from depthprune_runtime.errors import InputError, printable

Train = Literal["lora", "full"]
Optimizer = Literal["adamw", "adafactor"]
TRAIN: tuple[Train, ...] = get_args(Train)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
_MAX_COUNT = 1 << 40


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {printable(repr(value))}")


def _count(name: str, value: object, least: int = 1) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and least <= value < _MAX_COUNT
    if not good:
        raise InputError(f"{name}: expected an integer from {least} on, got {printable(repr(value))}")


def _number(name: str, value: object, low: float, high: float = math.inf, positive: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (positive and value == 0):  # type: ignore[operator]
        wanted = "a number above 0" if positive else f"a number from {low} to {high}"
        raise InputError(f"{name}: expected {wanted}, got {printable(repr(value))}")


@dataclass(frozen=True)
class HealOptions:
    """How a pruned model is trained.

    Args:
        train: `lora`: low-rank additions to every linear layer; `full`: all weights, norms and biases.
        rank: of each addition; queries, keys, values, gates and ups have one each.
        alpha: additions are scaled by alpha / rank.
        learning_rate: the peak, after the warm-up.
        epochs: how often the data is gone through; tokens: train on so many tokens instead.
        batch: windows in a step; micro_batch: windows that run together, which decides the memory of activations.
        seq_len: tokens in a window.
        warmup: share of the steps in which the learning rate rises; afterwards it falls as a cosine to 0.
        clip: largest norm of the gradient.
        weight_decay: of AdamW.
        optimizer: `adamw`, or `adafactor`, which keeps two vectors for a matrix.
        top_k: logits of the teacher that are kept for a token; the others count as one.
        hidden_weight: weight of the relative squared distance of the last hidden states; 0 leaves it out.
        held_out: windows that are never trained on; the loss on them is reported.
        eval_every, save_every: steps between reports on them, and between saves.
        recompute: keep only what enters a sub-layer, and run it again for its gradients.
        cache: keep the teacher's answers on disk; without it they are computed anew in every epoch.
        seed: of the windows' order and the first additions.
    """

    train: Train = "lora"
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-4
    epochs: float = 2.0
    tokens: int | None = None
    batch: int = 8
    micro_batch: int = 1
    seq_len: int = 512
    warmup: float = 0.03
    clip: float = 1.0
    weight_decay: float = 0.0
    optimizer: Optimizer = "adamw"
    top_k: int = 64
    hidden_weight: float = 0.0
    held_out: int = 16
    eval_every: int = 50
    save_every: int = 50
    recompute: bool = False
    cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("train", self.train, TRAIN)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("rank", "batch", "micro_batch", "top_k", "held_out", "eval_every", "save_every"):
            _count(name, getattr(self, name))
        _count("seq_len", self.seq_len, 2)
        _count("seed", self.seed, 0)
        if self.tokens is not None:
            _count("tokens", self.tokens)
        for name in ("alpha", "learning_rate", "epochs", "clip"):
            _number(name, getattr(self, name), 0.0, positive=True)
        _number("warmup", self.warmup, 0.0, 1.0)
        _number("weight_decay", self.weight_decay, 0.0)
        _number("hidden_weight", self.hidden_weight, 0.0)
        for name in ("recompute", "cache"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, got {printable(repr(getattr(self, name)))}")
        if self.batch % self.micro_batch:
            raise InputError(f"micro_batch: expected a divisor of batch {self.batch}, got {self.micro_batch}")


PRESETS: MappingProxyType[str, HealOptions] = MappingProxyType(
    {
        "paper": HealOptions(),
        "low-memory": HealOptions(train="full", optimizer="adafactor", recompute=True),
    }
)


def heal_options(preset: str, **changes: Any) -> HealOptions:
    """The options of `preset` with `changes`. Raises InputError for an unknown preset or a bad value."""
    if preset not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {printable(repr(preset))}")
    return dataclasses.replace(PRESETS[preset], **changes)
