"""Evaluate "the model without sub-layer i" for many i at once, without running the whole model for each.

The hidden states that enter every remaining sub-layer are kept, so a candidate at depth i starts from
its prefix. Candidates in one sweep share their suffix: each joins when the sweep has passed it, and from
there on all advance through the same sub-layer together, so its weights are read once for all of them.

Memory on the device: the model, L * N * S * C elements of prefixes (L remaining sub-layers, N windows of S
tokens; 60 * 10 * 256 of 576 in bf16: 0.2 GB), and the states of one sweep, at most `_SWEEP_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from depthprune_runtime.fitting.states import TokenStates
from depthprune_runtime.fitting.stream import Stream
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.pruning.finercut.distances import OutputDistance
from depthprune_runtime.pruning.finercut.options import Distance

_BATCH_TOKENS = 4096  # tokens in one call of a sub-layer: enough for GEMM speed, small in activations
_SWEEP_BYTES = 1 << 30  # hidden states of candidates that advance together


class CandidateScorer:
    """The current pruned model over calibration windows, and the distance of every possible next one.

    remaining: sub-layers left, in order, numbered as in the parent; dense_distance: of the dense model itself.
    """

    def __init__(self, decoder: Decoder, windows: Tensor, distance: Distance) -> None:  # windows [N, S] int64
        self._decoder = decoder
        self._windows = windows.shape[0]
        self._stream = Stream(windows.shape[1], decoder.device)  # a candidate that overflows has an infinite distance
        self._passes = 0  # sub-layers run over one window each
        self.remaining = list(range(len(decoder.sublayers)))
        states = decoder.embed(windows.flatten().to(decoder.device)).unflatten(0, windows.shape)  # [N, S, C]
        self._per_sweep = max(1, _SWEEP_BYTES // (states.numel() * states.element_size()))
        # [N, S, C] entering a sub-layer, by its number; current for the first `_filled` of `remaining`
        self._entering: dict[int, Tensor] = {0: states}
        self._filled = 1
        self._fill(len(self.remaining))
        states = self._entering[self.remaining[-1]].clone()
        self._advance(self.remaining[-1], states)
        final = self._final(states)
        self._distance = OutputDistance(distance, windows, final, decoder.logits)
        self.dense_distance = self._distance(final) if distance == "perplexity" else 0.0

    @property
    def windows(self) -> int:
        return self._windows

    @property
    def evaluations(self) -> float:
        """Sub-layers run over the whole calibration set so far, the dense pass included."""
        whole, rest = divmod(self._passes, self._windows)
        return self._passes / self._windows if rest else whole

    def _advance(self, index: int, states: Tensor) -> None:  # [k * N, S, C], in place
        """Run sub-layer `index` on the residual streams of k copies of the calibration set."""
        self._stream.advance(index, self._decoder.sublayers[index], TokenStates(states, _BATCH_TOKENS))
        self._passes += states.shape[0]

    def _final(self, states: Tensor) -> Tensor:  # [N, S, C] -> [N * S, C]
        return self._decoder.final(states.flatten(0, 1))

    def _fill(self, count: int) -> None:
        """Make the prefixes of the first `count` remaining sub-layers current."""
        while self._filled < count:
            previous = self.remaining[self._filled - 1]
            states = self._entering[previous].clone()
            self._advance(previous, states)
            self._entering[self.remaining[self._filled]] = states
            self._filled += 1

    def score(self, candidates: Sequence[int], windows: int | None = None) -> dict[int, float]:
        """Distance from the dense model without each of `candidates`, besides what is gone already.

        windows: only over so many of the calibration windows, the first ones.
        """
        ordered = sorted(candidates)
        self._fill(self.remaining.index(ordered[-1]) + 1)
        found = {}
        for first in range(0, len(ordered), self._per_sweep):
            found.update(self._sweep(ordered[first : first + self._per_sweep], windows or self._windows))
        return found

    def _sweep(self, group: list[int], windows: int) -> dict[int, float]:
        shape = self._entering[group[0]].shape[1:]
        states = self._entering[group[0]].new_empty(len(group), windows, *shape)  # [k, N, S, C]
        joined = 0
        for index in self.remaining[self.remaining.index(group[0]) :]:
            if joined:
                self._advance(index, states[:joined].flatten(0, 1))
            if joined < len(group) and index == group[joined]:
                states[joined] = self._entering[index][:windows]
                joined += 1
        return {index: self._distance(self._final(states[n])) for n, index in enumerate(group)}

    def remove(self, index: int) -> None:
        """Take sub-layer `index` out for good; prefixes behind it are renewed when they are next needed."""
        position = self.remaining.index(index)
        self.remaining.pop(position)
        if position >= self._filled:
            return
        states = self._entering.pop(index)
        for stale in self.remaining[position:]:
            self._entering.pop(stale, None)
        if position < len(self.remaining):
            self._entering[self.remaining[position]] = states
        self._filled = min(position + 1, len(self.remaining))
