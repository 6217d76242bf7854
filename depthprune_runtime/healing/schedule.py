"""Which windows a step trains on, and with which learning rate: functions of the step and the seed alone.

So a run that goes on after an interruption sees what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.healing.options import HealOptions


@dataclass(frozen=True)
class Share:
    """Windows `numbers` of one text, and how often an epoch goes through them."""

    numbers: tuple[int, ...]
    weight: float

    def drawn(self, generator: torch.Generator) -> list[int]:
        """One epoch's windows, not yet mixed; of a broken weight the rest is drawn."""
        whole = int(self.weight)
        rest = round((self.weight - whole) * len(self.numbers))
        some = torch.randperm(len(self.numbers), generator=generator)[:rest].tolist()
        return list(self.numbers) * whole + [self.numbers[i] for i in some]


def epoch_windows(shares: Sequence[Share], seed: int, epoch: int) -> list[int]:
    """Numbers of the windows of one epoch in the order of training."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    drawn = [number for share in shares for number in share.drawn(generator)]
    return [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]


def window_order(shares: Sequence[Share], seed: int) -> Iterator[int]:
    """Epoch behind epoch, without an end."""
    epoch = 0
    while True:
        yield from epoch_windows(shares, seed, epoch)
        epoch += 1


def total_steps(shares: Sequence[Share], options: HealOptions) -> int:
    """Steps of the whole run. Raises InputError where there is not enough text for one."""
    windows = len(epoch_windows(shares, options.seed, 0))
    if windows == 0:
        raise InputError("data: no text is left to train on; give more text, or fewer windows for held_out")
    if options.tokens is not None:
        steps, given = options.tokens // (options.batch * options.seq_len), f"tokens {options.tokens:,}"
    else:
        steps, given = int(options.epochs * windows) // options.batch, f"{windows} windows an epoch"
    if steps < 1:
        raise InputError(
            f"data: {given} are less than one step of {options.batch} windows of {options.seq_len} tokens; "
            "give more text, a smaller batch or shorter windows"
        )
    return steps


def learning_rate(step: int, steps: int, options: HealOptions) -> float:
    """Of step `step` from 0: a linear warm-up, then a cosine that ends at 0."""
    warmup = math.ceil(options.warmup * steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def held_out(count: int, options: HealOptions) -> Tensor:  # [h] int64
    """Numbers of the windows that are kept apart: the same for every run with this seed."""
    if count <= options.held_out:
        raise InputError(
            f"data: {count} windows of {options.seq_len} tokens, of which {options.held_out} are held out; "
            "give more text, shorter windows or a smaller held_out"
        )
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randperm(count, generator=generator)[: options.held_out].sort().values
