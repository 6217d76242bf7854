"""What is trained, as parameters of the student: low-rank additions, or the weights themselves.

Weights that are not trained lie in the compute dtype; what is trained is float32. Norm gains are always float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from depthprune_runtime.healing.options import HealOptions
from depthprune_runtime.healing.student import Parameters
from depthprune_runtime.spec import AttentionSpec, DecoderSpec

TensorGetter = Callable[[str], Tensor]


class Trainable(Parameters, Protocol):
    """Parameters some of which are trained."""

    def trained(self) -> dict[str, Tensor]:
        """The leaves that an optimizer changes, by a name of their own."""
        ...

    def merged(self) -> dict[str, Tensor]:
        """Tensors of the model that training changed, in float32."""
        ...


def sublayer_tensors(spec: DecoderSpec, start: int) -> list[str]:
    """Names of all tensors of the sub-layers from `start` on."""
    return [name for i in range(start, len(spec.sublayers)) for name in spec.sublayer_shapes(i)]


def part_rows(spec: DecoderSpec, name: str) -> list[int]:
    """Rows of the linear layers that the packed weight `name` holds: queries, keys and values; gates and ups."""
    _, index, short = name.split(".", 2)
    sublayer = spec.sublayers[int(index)]
    rows = spec.projections()[name][0]
    if isinstance(sublayer, AttentionSpec) and short == "qkv_proj.weight":
        return [sublayer.q_size, sublayer.kv_size, sublayer.kv_size]
    return [rows // 2, rows // 2] if short == "gate_up_proj.weight" else [rows]


class _Frozen:
    """Weights of the student, none of which are trained."""

    def __init__(
        self, spec: DecoderSpec, start: int, tensor: TensorGetter, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.spec = spec
        names = [*sublayer_tensors(spec, start), "norm.weight"]
        self.tensors = {
            name: tensor(name).to(device, torch.float32 if name.endswith("norm.weight") else dtype) for name in names
        }

    def vector(self, name: str) -> Tensor:
        return self.tensors[name]

    def linear(self, stem: str, x: Tensor) -> Tensor:
        return linear(x, self.tensors[f"{stem}.weight"], self.tensors.get(f"{stem}.bias"))


class LowRank(_Frozen):
    """LoRA: W + alpha / rank * B A for every linear layer. Source: Hu et al., arXiv 2106.09685.

    The linear layers in a packed weight have additions of their own: A of them lie below each other, and so do B.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        start: int,
        tensor: TensorGetter,
        device: torch.device,
        dtype: torch.dtype,
        options: HealOptions,
    ) -> None:
        super().__init__(spec, start, tensor, device, dtype)
        self._tensor = tensor
        self._rank = options.rank
        self._scale = options.alpha / options.rank
        shapes = spec.projections()
        names = [name for name in sublayer_tensors(spec, start) if name in shapes]
        self._rows = {name: part_rows(spec, name) for name in names}
        generator = torch.Generator().manual_seed(options.seed)
        self._down: dict[str, Tensor] = {}  # A, [parts * rank, K]
        self._up: dict[str, Tensor] = {}  # B, [N, rank]
        for name in names:
            rows, columns = shapes[name]
            first = torch.empty(len(self._rows[name]) * options.rank, columns)
            first.uniform_(-1.0, 1.0, generator=generator).mul_(1.0 / math.sqrt(columns))
            self._down[name] = first.to(device).requires_grad_()
            self._up[name] = torch.zeros(rows, options.rank, device=device).requires_grad_()

    def trained(self) -> dict[str, Tensor]:
        found = {f"{name}.lora_A": value for name, value in self._down.items()}
        return found | {f"{name}.lora_B": value for name, value in self._up.items()}

    def _spread(self, name: str) -> Tensor:  # [N, parts * rank]
        """alpha / rank * B, each part's in columns of its own, so that one product adds all."""
        rows = self._rows[name]
        ups = (self._up[name] * self._scale).to(self.dtype)
        return ups if len(rows) == 1 else torch.block_diag(*ups.split(rows))

    def linear(self, stem: str, x: Tensor) -> Tensor:
        name = f"{stem}.weight"
        flat = x.flatten(0, -2)
        low = linear(flat, self._down[name].to(self.dtype))
        return torch.addmm(super().linear(stem, flat), low, self._spread(name).T).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        found = {}
        for name, rows in self._rows.items():
            downs, ups = self._down[name].split(self._rank), self._up[name].split(rows)
            added = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)]) * self._scale
            found[name] = self._tensor(name).float() + added.cpu()
        return found


class Full(_Frozen):
    """All weights, biases and norms of the sub-layers, and the last norm; embedding and head stay."""

    def __init__(
        self, spec: DecoderSpec, start: int, tensor: TensorGetter, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, start, tensor, device, dtype)
        self._masters = {
            name: tensor(name).to(device, torch.float32, copy=True).requires_grad_() for name in self.tensors
        }
        self.tensors = {}

    def trained(self) -> dict[str, Tensor]:
        return dict(self._masters)

    def vector(self, name: str) -> Tensor:
        return self._masters[name]

    def linear(self, stem: str, x: Tensor) -> Tensor:
        bias = self._masters.get(f"{stem}.bias")
        weight = self._masters[f"{stem}.weight"].to(self.dtype)
        return linear(x, weight, None if bias is None else bias.to(self.dtype))

    def merged(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self._masters.items()}


def trainable(
    spec: DecoderSpec,
    start: int,
    tensor: TensorGetter,
    device: torch.device,
    dtype: torch.dtype,
    options: HealOptions,
) -> Trainable:
    """Parameters as `options` ask for them. tensor: the pruned model's, by name; dtype: of the arithmetic."""
    if options.train == "lora":
        return LowRank(spec, start, tensor, device, dtype, options)
    return Full(spec, start, tensor, device, dtype)
