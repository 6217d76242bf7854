"""The training loop: windows through the student, gradients, steps, reports and saves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.healing.loss import kept_divergence, next_token_loss, relative_distance
from depthprune_runtime.healing.options import HealOptions
from depthprune_runtime.healing.parameters import Trainable
from depthprune_runtime.healing.schedule import Share, learning_rate, window_order
from depthprune_runtime.healing.state import HealState
from depthprune_runtime.healing.student import Student
from depthprune_runtime.healing.targets import Target, Targets, perplexity

Report = Callable[[str], None]


@dataclass(frozen=True)
class Material:
    """What a run learns from. shares: windows to train on; held_out: windows to report on; head: it is not trained."""

    windows: Tensor  # [N, S] int64
    targets: Targets
    shares: Sequence[Share]
    held_out: Sequence[int]
    head: Tensor  # [V, C]


class Training:
    """One run of `steps` steps.

    Args:
        student: what is trained, over `parameters`.
        parameters: the leaves.
        material: see `Material`.
        options: of the run.
        steps: of the whole run, those done before an interruption included.
        device: where the student runs.
        key: what decides the run, JSON values.
        state_file: where the state is saved; None keeps none.
    """

    def __init__(
        self,
        student: Student,
        parameters: Trainable,
        material: Material,
        options: HealOptions,
        steps: int,
        device: torch.device,
        key: dict[str, Any],
        state_file: Path | None,
    ) -> None:
        self._student = student
        self._trained = parameters.trained()
        self._material = material
        self._options = options
        self.steps = steps
        self._device = device
        self._key = key
        self._state_file = state_file
        self._optimizer = _optimizer(list(self._trained.values()), options)
        self.done = 0
        self.history: list[dict[str, float]] = []

    def resume(self, state: HealState) -> None:
        """Go on from `state`. Raises InputError where it is of another model."""
        if {n: t.shape for n, t in state.trained.items()} != {n: t.shape for n, t in self._trained.items()}:
            raise InputError(f"state {self._state_file}: of another model; begin anew with --force")
        with torch.no_grad():
            for name, value in state.trained.items():
                self._trained[name].copy_(value)
        self._optimizer.load_state_dict(state.optimizer)
        self.done, self.history = state.step, state.history

    def run(self, report: Report = lambda _: None) -> None:
        """Train to the end. report: called after each step with a line about it."""
        if not self.history:
            self._evaluate()
        batches = _batches(self._material.shares, self._options, self.done)
        while self.done < self.steps:
            rate = learning_rate(self.done, self.steps, self._options)
            loss, norm = self._step(next(batches), rate)
            self.done += 1
            ended = self.done == self.steps
            if ended or self.done % self._options.eval_every == 0:
                self._evaluate()
            if ended or self.done % self._options.save_every == 0:
                self._save()
            last = self.history[-1]
            report(
                f"loss {loss:.4f}, gradient {norm:.2f}, rate {rate:.1e}; held out: loss {last['loss']:.4f}, "
                f"perplexity {last['perplexity']:.2f}"
            )

    def _step(self, numbers: Sequence[int], rate: float) -> tuple[float, float]:
        """One step over windows `numbers`; (loss, norm of its gradient)."""
        total, options = 0.0, self._options
        for group in _groups(numbers, options):
            loss = self._loss([self._material.targets[n] for n in group])
            (loss * (len(group) / len(numbers))).backward()
            total += float(loss.detach()) * len(group) / len(numbers)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._trained.values()), options.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise InputError(
                f"step {self.done + 1}: the loss or its gradient is not finite; give a smaller learning rate, or dtype "
                "fp32"
            )
        for group_of in self._optimizer.param_groups:
            group_of["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _hidden(self, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """(last states [B, S, C], the same behind the norm [B * S, C])."""
        entering = torch.stack([t.states for t in targets]).to(self._device).float()
        states = self._student.states(entering)
        return states, self._student.final(states).flatten(0, 1)

    def _loss(self, targets: Sequence[Target]) -> Tensor:
        states, hidden = self._hidden(targets)
        loss = self._divergence(hidden, targets)
        if self._options.hidden_weight:
            wanted = torch.stack([t.last for t in targets]).to(self._device)
            loss = loss + self._options.hidden_weight * relative_distance(states, wanted)
        return loss

    def _divergence(self, hidden: Tensor, targets: Sequence[Target]) -> Tensor:
        ids = torch.cat([t.ids for t in targets]).to(self._device, torch.int64)
        logprobs = torch.cat([t.logprobs for t in targets]).to(self._device)
        return kept_divergence(hidden, self._material.head, ids, logprobs)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Put loss and perplexity on the windows held out into the history."""
        losses, nats, predictions = 0.0, 0.0, 0
        for number in self._material.held_out:
            target = self._material.targets[number]
            _, hidden = self._hidden([target])
            losses += float(self._divergence(hidden, [target]))
            ids = self._material.windows[number].to(self._device)
            nats += next_token_loss(hidden, self._material.head, ids)
            predictions += ids.shape[0] - 1
        count = len(self._material.held_out)
        self.history.append({"step": self.done, "loss": losses / count, "perplexity": perplexity(nats / predictions)})

    def _save(self) -> None:
        if self._state_file is not None:
            trained = {name: value.detach().cpu() for name, value in self._trained.items()}
            HealState(self.done, trained, self._optimizer.state_dict(), self.history).save(self._state_file, self._key)


def _groups(numbers: Sequence[int], options: HealOptions) -> list[Sequence[int]]:
    """Windows that run together."""
    return [numbers[i : i + options.micro_batch] for i in range(0, len(numbers), options.micro_batch)]


def _batches(shares: Sequence[Share], options: HealOptions, done: int) -> Iterator[list[int]]:
    """Windows of each step from step `done` on."""
    order = itertools.islice(window_order(shares, options.seed), done * options.batch, None)
    while True:
        yield list(itertools.islice(order, options.batch))


def _optimizer(leaves: list[Tensor], options: HealOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adafactor":
        return torch.optim.Adafactor(leaves, lr=options.learning_rate, weight_decay=options.weight_decay)
    return torch.optim.AdamW(leaves, lr=options.learning_rate, weight_decay=options.weight_decay)
