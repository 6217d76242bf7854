"""Which ops Triton serves on CUDA devices: op -> module of depthprune_runtime.kernels that has a launcher of its name.

Where the C++ extension has registered an op for CUDA, that stays its owner: one owner an (op, device).
"""

from __future__ import annotations

import importlib
import logging

from depthprune_runtime.ops._library import bind, implementations

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


def bind_triton() -> None:
    """Bind the launchers of the ops that have only a reference on CUDA; once, where ops is imported."""
    missing = [name for name in LAUNCHERS if implementations(name)["CUDA"] == "reference"]
    if len(missing) < len(LAUNCHERS):
        _log.info("CUDA: C++ serves %s", ", ".join(name for name in LAUNCHERS if name not in missing))
    try:
        found = {
            name: getattr(importlib.import_module(f"depthprune_runtime.kernels.{LAUNCHERS[name]}"), name)
            for name in missing
        }
    except ImportError as error:
        _log.warning("Triton kernels not loaded (%s): CUDA ops run as plain torch; install triton", error)
        return
    for name, launcher in found.items():
        bind(name, launcher, "CUDA")
    _log.info("CUDA: Triton serves %s", ", ".join(missing))
