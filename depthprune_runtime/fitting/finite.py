"""Hidden states that are not finite: found where they first appear, and told apart by where they come from.

Statistics of infinite or NaN states are NaN, and the solvers that get them raise errors that name no cause.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.host.devices import overflow_hint
from depthprune_runtime.model.decoder import SublayerLoader


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN; one pass without a mask."""
    least, most = values.aminmax()
    return bool(least.isfinite() & most.isfinite())


@dataclass(frozen=True)
class FiniteStates:
    """Refuses states that are not finite. loader: of the sub-layers that leave them; model: its name in messages."""

    loader: SublayerLoader
    model: str = "model"

    def __call__(self, states: Tensor, index: int) -> None:
        """Check `states`, which sub-layer `index` left.

        Raises InputError in one line that names the first weight that is not finite, or, where all of them are, the
        sub-layer in which the dtype overflows.
        """
        if states.numel() == 0 or is_finite(states):
            return
        loader = self.loader
        spec, dtype = loader.spec.sublayers[index], str(loader.dtype).removeprefix("torch.")
        for name in ("embed_tokens.weight", *loader.spec.sublayer_shapes(index)):
            if not is_finite(loader.tensor(name)):
                raise InputError(
                    f"{self.model}: {name} (block {spec.origin[0]}) holds infinite or NaN weights in {dtype}: "
                    f"it is damaged, or was too large for a dtype; {overflow_hint(loader.dtype)}"
                )
        raise InputError(
            f"{self.model}: the {spec.kind} of block {spec.origin[0]} leaves hidden states that are not finite: "
            f"{dtype} overflows; {overflow_hint(loader.dtype)}"
        )
