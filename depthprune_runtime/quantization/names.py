"""Names of the methods, without importing torch: the command line shows them in its help."""

from __future__ import annotations

from typing import Literal, get_args

QuantMethod = Literal["auto", "rtn", "gptq"]

QUANT_METHODS: tuple[QuantMethod, ...] = get_args(QuantMethod)
DEFAULT_GROUPS = {8: 64, 4: 32}  # bits -> inputs that share a scale
HEAD_BITS = (8, 4, 16)  # of the head; 16 leaves it in the checkpoint's dtype
