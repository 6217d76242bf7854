"""Where and in what to compute: `device` and `dtype` arguments of the public functions."""

from __future__ import annotations

import torch

from depthprune_runtime.errors import InputError

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {device!r} is not available: {str(error).splitlines()[0]}") from error
    return resolved


def may_round_activations(activations: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products by quantised weights may round their inputs to 8 bits; `dtype` is what the model computes in.

    `auto` leaves it to the device: kernels of the CPU do, those of a GPU do not. `int8` asks for it, the name of
    `dtype` forbids it.
    """
    if activations == "auto":
        return True
    if activations == "int8":
        if device.type != "cpu":
            raise InputError(f"activations: int8 is for the CPU; {device.type} keeps them in the model's dtype")
        return True
    if _DTYPES.get(activations) != dtype:
        own = min((name for name, value in _DTYPES.items() if value == dtype), key=len)
        raise InputError(f"activations: expected auto, int8 or {own} (what the model computes in), got {activations!r}")
    return device.type != "cpu"  # where nothing is rounded anyhow, the usual kernels stay


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype by name; `auto` and None mean the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return None
    resolved = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(dtype)
    if resolved not in _DTYPES.values():
        raise InputError(f"dtype: expected auto, {', '.join(_DTYPES)}, got {dtype!r}")
    return resolved


def overflow_hint(dtype: torch.dtype) -> str:
    """What to do where numbers of `dtype` became infinite."""
    if dtype == torch.float16:
        return "give dtype bf16 or fp32 (and a source that was not made in fp16)"
    return "give dtype fp32" if dtype == torch.bfloat16 else "its weights are too large to compute with"
