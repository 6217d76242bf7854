"""Options of healing: frozen, validated, with their defaults and presets. Imports no torch.

Where the defaults come from: `rank` 8, `learning_rate` 1e-4 and `epochs` 2 are the recovery of the FlattenGPT paper
(arXiv 2602.08858), which trains LoRA on all linear layers. `alpha` 16 is the usual twice the rank; the paper names
none. The other numbers are ours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.options import (
    check_choice,
    check_count,
    check_count_or_none,
    check_flags,
    check_number,
    flag,
)

Train = Literal["lora", "full"]
Optimizer = Literal["adamw", "adafactor"]


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
        weight_decay: of the optimizer.
        optimizer: `adamw`, or `adafactor`, which keeps two vectors for a matrix.
        top_k: logits of the teacher that are kept for a token; the others count as one.
        hidden_weight: weight of the relative squared distance of the last hidden states; 0 leaves it out.
        held_out: windows that are never trained on; the loss on them is reported.
        eval_every, save_every: steps between reports on them, and between saves.
        recompute: keep only what enters a sub-layer, and run it again for its gradients.
        cache: keep the teacher's answers on disk; without it they are computed anew in every epoch.
        seed: of the windows' order and the first additions.
    """

    train: Train = field(
        default="lora", metadata=flag("low-rank additions to all linear layers (default lora), or all weights")
    )
    rank: int = field(default=8, metadata=flag("of each addition (8)", metavar="R"))
    alpha: float = field(default=16.0, metadata=flag("additions are scaled by alpha / rank (16)", metavar="A"))
    learning_rate: float = field(default=1e-4, metadata=flag("the peak (1e-4)", metavar="L"))
    epochs: float = field(default=2.0, metadata=flag("how often the data is gone through (2)", metavar="E"))
    tokens: int | None = field(default=None, metadata=flag("train on so many tokens instead", metavar="N"))
    batch: int = field(default=8, metadata=flag("windows in a step (8)", metavar="B"))
    micro_batch: int = field(default=1, metadata=flag("windows that run together (1)", metavar="B"))
    seq_len: int = field(default=512, metadata=flag("tokens in a window (512)", metavar="S"))
    warmup: float = field(
        default=0.03, metadata=flag("share of the steps in which the learning rate rises (0.03)", metavar="R")
    )
    clip: float = field(default=1.0, metadata=flag("largest norm of the gradient (1)", metavar="C"))
    weight_decay: float = field(default=0.0, metadata=flag("of the optimizer (0)", metavar="D"))
    optimizer: Optimizer = field(
        default="adamw", metadata=flag("adafactor takes less memory for train full (default adamw)")
    )
    top_k: int = field(default=64, metadata=flag("logits of the teacher that are kept for a token (64)", metavar="K"))
    hidden_weight: float = field(
        default=0.0, metadata=flag("weight of the distance of the last hidden states (0)", metavar="W")
    )
    held_out: int = field(default=16, metadata=flag("windows that are only reported on (16)", metavar="N"))
    eval_every: int = field(default=50, metadata=flag("steps between reports on them (50)", metavar="N"))
    save_every: int = field(default=50, metadata=flag("steps between saves of the state (50)", metavar="N"))
    recompute: bool = field(default=False, metadata=flag("run each sub-layer again for its gradients, to save memory"))
    cache: bool = field(default=True, metadata=flag("keep the teacher's answers on disk (default)"))
    seed: int = field(default=0, metadata=flag("of the windows' order and the first additions (0)", metavar="N"))

    def __post_init__(self) -> None:
        check_choice("train", self.train, get_args(Train))
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        for name in ("rank", "batch", "micro_batch", "top_k", "held_out", "eval_every", "save_every", "seq_len"):
            check_count(name, getattr(self, name))
        check_count_or_none("tokens", self.tokens)
        for name in ("alpha", "learning_rate", "epochs", "clip", "warmup", "weight_decay", "hidden_weight", "seed"):
            check_number(name, getattr(self, name), 0.0, 1.0 if name == "warmup" else 2.0**53)
        for name in ("alpha", "learning_rate", "epochs", "clip"):
            if getattr(self, name) == 0:
                raise InputError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        if not isinstance(self.seed, int):
            raise InputError(f"seed: expected an integer, got {printable(repr(self.seed))}")
        if self.seq_len < 2:
            raise InputError(f"seq_len: expected at least 2, got {self.seq_len}")
        check_flags(self, "recompute", "cache")
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
