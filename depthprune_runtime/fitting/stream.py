"""`Stream`: the forward pass of every method, one sub-layer over the states of all calibration tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from depthprune_runtime.fitting.states import TokenStates
from depthprune_runtime.model.batch import Batch, packed
from depthprune_runtime.model.decoder import SublayerLoader, embedded
from depthprune_runtime.model.sublayers import Sublayer

Check = Callable[[Tensor, int], None]
"""Refuses the states [n * S, C] that the sub-layer of that number leaves."""


def embed(loader: SublayerLoader, windows: Tensor, states: TokenStates) -> None:  # [N, S] int64
    """Let `states` be what enters the first sub-layer; the table is in memory no longer than that takes."""
    table = loader.weight("embed_tokens.weight")
    for n, window in enumerate(windows):
        states.values[n] = embedded(table, window.to(loader.device), loader.dtype, loader.spec.embedding_scale)


class Stream:
    """Runs sub-layers over token states, batch by batch.

    Args:
        seq_len: S, tokens of a window; no token sees another window's.
        device: of states and sub-layers.
        check: what refuses the states that a sub-layer leaves; None lets all pass.
    """

    def __init__(self, seq_len: int, device: torch.device, check: Check | None = None) -> None:
        self._seq_len = seq_len
        self._device = device
        self._check = check
        self._batches: dict[int, Batch] = {}  # by the number of windows

    def _batch(self, states: Tensor) -> Batch:  # [n * S, C]
        count = states.shape[0] // self._seq_len
        if count not in self._batches:
            self._batches[count] = packed([self._seq_len] * count, self._device)
        return self._batches[count]

    def inner(self, sublayer: Sublayer, states: Tensor) -> Tensor:  # [n * S, C] -> [n * S, width]
        """Inner activations of one batch: the heads' outputs, or psi."""
        return sublayer.inner(sublayer.enter(states), self._batch(states))

    def outputs(
        self,
        index: int,
        sublayer: Sublayer,
        states: TokenStates,
        into: TokenStates | None = None,
        inner: TokenStates | None = None,
    ) -> Iterator[Tensor]:  # [n * S, C] each
        """Run `sublayer` over all states; yields what it added to each batch, in the dtype of the states.

        Args:
            index: number of the sub-layer, for messages.
            sublayer: what runs.
            states: the residual stream entering it.
            into: where the stream leaving it is written; None: in place.
            inner: where its inner activations are kept; None: nowhere.
        """
        for b in range(len(states)):
            entering = states.batch(b)
            leaving = entering if into is None else into.batch(b)
            activations = self.inner(sublayer, entering)
            if inner is not None:
                inner.batch(b).copy_(activations)
            out = sublayer.leave(sublayer.project(activations)).to(entering.dtype)
            del activations
            torch.add(entering, out, out=leaving)
            if self._check is not None:
                self._check(leaving, index)
            yield out

    def advance(
        self,
        index: int,
        sublayer: Sublayer,
        states: TokenStates,
        into: TokenStates | None = None,
        inner: TokenStates | None = None,
    ) -> None:
        """`outputs`, of which the caller needs none."""
        for _ in self.outputs(index, sublayer, states, into, inner):
            pass
