"""GPTQ along the walk: every projection is quantised for the inputs that the quantised layers before it leave.

The dense model is the teacher of the walk, the model quantised so far its student. In a sub-layer the input projection
(qkv_proj, gate_up_proj) comes first, then, on the inner activations that it now leads to, the output projection
(o_proj, down_proj). That one may first be solved anew as a repair does (`fitting.projection`), so that the student's
hidden state meets the dense model's again, and what is rounded is the solution: the errors of the layers before are
mended, not carried on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting import linalg
from depthprune_runtime.fitting import projection as repair
from depthprune_runtime.fitting.options import RepairOptions
from depthprune_runtime.fitting.walk import Visit
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.model.sublayers import Attention, Sublayer
from depthprune_runtime.quantization.gptq import DAMPING, gptq
from depthprune_runtime.quantization.view import QuantizedCheckpoint
from depthprune_runtime.weights.quantized import QuantSpec


class Calibrated:
    """Visitor of the walk that quantises what it meets into `view`.

    quants: name -> how it is to be quantised, of the projections of sub-layers; mend: how output projections are
    solved anew before, None: not.
    """

    def __init__(
        self,
        view: QuantizedCheckpoint,
        quants: Mapping[str, QuantSpec],
        mend: RepairOptions | None,
        device: torch.device,
        damping: float = DAMPING,
    ) -> None:
        self._view = view
        self._quants = quants
        self._mend = mend
        self._damping = damping
        self._loader = SublayerLoader(view.spec, view.tensor, device, view.dtype)

    def visit(self, visit: Visit) -> Sublayer:
        """Quantise both projections of one sub-layer; the student goes on with the result."""
        attention = isinstance(visit.sublayer, Attention)
        prefix = f"sublayers.{visit.index}."
        first = f"{prefix}{'qkv' if attention else 'gate_up'}_proj.weight"
        second = f"{prefix}{'o' if attention else 'down'}_proj.weight"
        if first in self._quants:
            weight = self._loader.weight(first).dense()
            self._put(first, weight, _gram(visit.hidden(b) for b in range(len(visit.states))))
            visit = dataclasses.replace(visit, sublayer=self._loader.sublayer(visit.index))
        if second in self._quants:
            weight = visit.sublayer.output_weight.float()
            if self._mend is None:
                gram = _gram(visit.inner(b) for b in range(len(visit.states)))
            else:
                moments = repair.accumulate(visit, self._mend.weighting)
                _check_finite(second, moments.gram)
                weight, gram = repair.solve(moments, weight, None, self._mend.lam), moments.gram
            self._put(second, weight, gram)
        return self._loader.sublayer(visit.index)

    def _put(self, name: str, weight: Tensor, gram: Tensor) -> None:  # [N, K], [K, K]
        _check_finite(name, gram)
        self._view.put(name, gptq(weight, gram, self._quants[name], self._damping))


def _check_finite(name: str, gram: Tensor) -> None:  # [K, K]
    if not torch.isfinite(gram.diagonal()).all():
        raise InputError(
            f"{name}: expected finite inputs on the calibration text, got infinite or NaN ones; use bf16 or fp32, or "
            "method rtn"
        )


def _gram(batches: Iterator[Tensor]) -> Tensor:  # [T, K] each -> [K, K]
    """Mean of x x' over all rows x of `batches`."""
    gram: Tensor | None = None
    tokens = 0
    for batch in batches:
        if gram is None:
            gram = linalg.zeros((batch.shape[1], batch.shape[1]), torch.float32, batch.device)
        linalg.accumulate_gram_(gram, batch)
        tokens += batch.shape[0]
    assert gram is not None
    return linalg.mirror_(gram).div_(tokens)
