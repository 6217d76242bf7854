"""Which ops Triton serves on CUDA devices: op -> module of depthprune_runtime.kernels that has a launcher of its name.

Where the C++ extension has registered an op for CUDA, that stays its owner: one owner an (op, device). A launcher knows
tensors and integers only; where its module has `takes`, the reference runs for what that refuses.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from depthprune_runtime.ops._library import REFERENCES, bind, implementations

LAUNCHERS = {
    "add_rms_norm": "norm",
    "draw_tokens": "draw_tokens",
    "gated_linear": "gated_linear",
    "linear_add": "linear_add",
    "next_tokens": "next_tokens",
    "norm_gated_linear": "norm_linear",
    "norm_linear": "norm_linear",
    "norm_logits": "norm_linear",
    "norm_qkv": "norm_qkv",
    "paged_attention": "attention",
    "rms_norm": "norm",
    "rotary_kv_write": "rotary_kv_write",
    "varlen_attention": "attention",
}
_log = logging.getLogger("depthprune_runtime")


def implementation(name: str) -> Callable[..., Any]:
    """Op `name` by its launcher, or by the reference where the launcher does not take the first argument."""
    module = importlib.import_module(f"depthprune_runtime.kernels.{LAUNCHERS[name]}")
    launcher: Callable[..., Any] = getattr(module, name)
    takes: Callable[[Tensor], bool] | None = getattr(module, "takes", None)
    if takes is None:
        return launcher
    reference = REFERENCES[name]

    @functools.wraps(launcher)
    def chosen(x: Tensor, *rest: Any) -> Any:
        return launcher(x, *rest) if takes(x) else reference(x, *rest)

    return chosen


def bind_triton() -> None:
    """Bind the launchers of the ops that have only a reference on CUDA; once, where ops is imported."""
    missing = [name for name in LAUNCHERS if implementations(name)["CUDA"] == "reference"]
    if len(missing) < len(LAUNCHERS):
        _log.info("CUDA: C++ serves %s", ", ".join(name for name in LAUNCHERS if name not in missing))
    try:
        found = {name: implementation(name) for name in missing}
    except ImportError as error:
        _log.warning("Triton kernels not loaded (%s): CUDA ops run as plain torch; install triton", error)
        return
    for name, launcher in found.items():
        bind(name, launcher, "CUDA")
    _log.info("CUDA: Triton serves %s", ", ".join(missing))
