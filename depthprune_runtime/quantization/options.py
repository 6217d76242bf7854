"""Options of quantisation, and what they may be. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from depthprune_runtime.options import check_choice, check_flags, flag

Bits = Literal[8, 4]
GroupSize = Literal[32, 64, 128]
QuantMethod = Literal["auto", "rtn", "gptq"]
HeadBits = Literal[8, 4, 16]

BITS: tuple[Bits, ...] = get_args(Bits)
GROUP_SIZES: tuple[GroupSize, ...] = get_args(GroupSize)
QUANT_METHODS: tuple[QuantMethod, ...] = get_args(QuantMethod)
HEAD_BITS: tuple[HeadBits, ...] = get_args(HeadBits)
DEFAULT_GROUPS: dict[int, GroupSize] = {8: 64, 4: 32}  # bits -> inputs that share a scale


@dataclass(frozen=True)
class QuantizeOptions:
    """bits: of every projection; group_size: inputs that share a scale, None: 64 at 8 bits, 32 at 4; symmetric: no zero
    points; method: rtn (round to nearest), gptq, or auto: gptq at 4 bits, rtn at 8; mend: with gptq, solve output
    projections anew before they are rounded; lm_head_bits: of the head, always by rtn, 16 leaves it as it is."""

    bits: Bits = field(default=8, metadata=flag("of every projection (default 8)"))
    group_size: GroupSize | None = field(
        default=None, metadata=flag("inputs that share a scale (64; 4 bits: 32)", name="group")
    )
    symmetric: bool = field(default=True, metadata=flag("give every group a zero point, too", off="asymmetric"))
    method: QuantMethod = field(default="auto", metadata=flag("auto: gptq for 4 bits, rtn (no calibration) for 8"))
    mend: bool = field(
        default=True,
        metadata=flag("gptq: solve output projections anew against the errors before them (default on)"),
    )
    lm_head_bits: HeadBits = field(default=8, metadata=flag("16 leaves the head as it is (8)"))

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        if self.group_size is not None:
            check_choice("group_size", self.group_size, GROUP_SIZES)
        check_flags(self, "symmetric", "mend")
        check_choice("method", self.method, QUANT_METHODS)
        check_choice("lm_head_bits", self.lm_head_bits, HEAD_BITS)

    def resolved(self) -> tuple[int, Literal["rtn", "gptq"]]:
        """The group size and the method, where they are left open."""
        method = self.method if self.method != "auto" else "gptq" if self.bits == 4 else "rtn"
        return DEFAULT_GROUPS[self.bits] if self.group_size is None else self.group_size, method
