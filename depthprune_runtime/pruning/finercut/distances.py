"""Distances between the outputs of a dense model and of a pruned one, over calibration tokens.

With logits x (dense) and y (pruned), P = softmax(x), Q = softmax(y) and M = (P + Q) / 2, per token:

    norm        |x - y|^2, then mean over windows of the square root of a window's sum (Frobenius norm)
    angular     arccos( x.y / (|x| |y|) ), in radians
    kl          KL(P || Q), in nats
    js          0.5 [ KL(P || M) + KL(Q || M) ], the textbook's
    js_reverse  0.5 [ KL(M || P) + KL(M || Q) ], what FinerCut's official code computes under the name of JS
    perplexity  -log Q(next token), then exp of the mean over all but each window's last token; no dense model

Sources: Zhang et al., arXiv 2405.18218 (FinerCut) and its official code; perplexity: Zhong et al.,
arXiv 2406.10594 (BlockPruner). All are computed in float32, a chunk of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softplus

from depthprune_runtime import ops
from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.finercut.options import DISTANCES, Distance

Head = Callable[[Tensor], Tensor]  # [R, C] -> [R, V], logits of final hidden states

_CHUNK_ELEMENTS = 1 << 22  # logits at a time: 16 MB a float32 temporary, whatever the vocabulary


def _squared_error(dense: Tensor, pruned: Tensor) -> Tensor:  # [R, V] twice -> [R]
    return (dense - pruned).square().sum(-1)


def _angle(dense: Tensor, pruned: Tensor) -> Tensor:  # [R, V] twice -> [R]
    # arccos is ill-conditioned near 0, where early removals lie: a cosine rounded by 6e-8 is 3e-4 rad.
    # This is the same angle without that loss (Kahan, "How futile are mindless assessments of roundoff").
    x = dense / dense.norm(dim=-1, keepdim=True)
    y = pruned / pruned.norm(dim=-1, keepdim=True)
    return 2.0 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))


def _kl(dense: Tensor, pruned: Tensor) -> Tensor:  # [R, V] twice -> [R]
    p, q = log_softmax(dense, -1), log_softmax(pruned, -1)
    return (p.exp() * (p - q)).sum(-1)


def _js(dense: Tensor, pruned: Tensor) -> Tensor:  # [R, V] twice -> [R]
    p, q = log_softmax(dense, -1), log_softmax(pruned, -1)
    # log P - log M = log 2 - softplus(log Q - log P)
    gap = q - p
    terms = p.exp() * (math.log(2) - softplus(gap)) + q.exp() * (math.log(2) - softplus(-gap))
    return 0.5 * terms.sum(-1)


_COMPARISONS: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": _squared_error,
    "angular": _angle,
    "kl": _kl,
    "js": _js,
    "js_reverse": ops.js_reverse,
}


def check_distance(name: str) -> None:
    """Refuse an unknown distance."""
    if name not in DISTANCES:
        raise InputError(f"distance: expected one of {', '.join(DISTANCES)}, got {name!r}")


class OutputDistance:
    """Distance of pruned models from one dense model over N windows of S tokens.

    Holds the dense logits once, in their dtype: N * S * V elements (10 windows of 256 tokens with a
    vocabulary of 128k: 0.7 GB in bf16); `perplexity` holds none. Raises InputError if the dense logits are
    not finite.
    """

    def __init__(
        self,
        name: Distance,
        windows: Tensor,  # [N, S] int64
        dense: Tensor,  # [N * S, C] final hidden states of the dense model
        head: Head,
    ) -> None:
        check_distance(name)
        self.name = name
        self._head = head
        self._shape = windows.shape
        # the last token of a window has no successor; its entry is computed and left out
        self._targets = windows.roll(-1, dims=1).flatten().to(dense.device)  # [N * S]
        self._reference: list[Tensor] | None = None  # chunks of [R, V]
        probe = head(dense[:1])
        self._rows = max(1, _CHUNK_ELEMENTS // probe.shape[-1])
        if name != "perplexity":
            self._reference = [head(rows) for rows in dense.split(self._rows)]
        finite = probe.isfinite().all() if self._reference is None else all(r.isfinite().all() for r in self._reference)
        if not finite:
            raise InputError(
                "model: its logits are not finite; they overflow in this dtype (give bf16 or fp32), or its weights are "
                "damaged"
            )

    @property
    def reference_bytes(self) -> int:
        return sum(r.numel() * r.element_size() for r in self._reference or ())

    def __call__(self, hidden: Tensor) -> float:  # [n * S, C], n <= N
        """Distance of the model with these final hidden states of the first n windows; `inf` where not finite."""
        values = []
        for i, rows in enumerate(hidden.split(self._rows)):
            logits = self._head(rows)
            if self._reference is None:
                targets = self._targets[i * self._rows : i * self._rows + rows.shape[0]]
                values.append(cross_entropy(logits.float(), targets, reduction="none"))
            else:
                values.append(self._compare(self._reference[i][: rows.shape[0]], logits))
        result = self._reduce(torch.cat(values).double().view(-1, self._shape[1]))
        return math.inf if math.isnan(result) else result

    def _compare(self, dense: Tensor, pruned: Tensor) -> Tensor:  # [R, V] twice -> [R]
        assert self.name != "perplexity"
        if self.name == "js_reverse":  # widens what it reads
            return ops.js_reverse(dense, pruned)
        return _COMPARISONS[self.name](dense.float(), pruned.float())

    def _reduce(self, values: Tensor) -> float:  # [N, S] float64
        if self.name == "norm":
            return float(values.sum(1).sqrt().mean())
        if self.name == "perplexity":
            return float(values[:, :-1].mean().exp())
        return float(values.mean())
