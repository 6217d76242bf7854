"""The contract of every op: schema, plain-torch reference, wrapper with shapes.

Importing this package also binds what is built: the C++ extension (CPU) and, on a machine with a
CUDA device and Triton, the kernels. What is missing is said once in the log, and the reference runs.
"""

from __future__ import annotations

import logging

import torch

from depthprune_runtime.ops._library import bind, implementations
from depthprune_runtime.ops.activation import silu_mul
from depthprune_runtime.ops.attention import paged_attention, varlen_attention
from depthprune_runtime.ops.gated_linear import gated_linear
from depthprune_runtime.ops.greedy import greedy
from depthprune_runtime.ops.kv_cache import kv_write
from depthprune_runtime.ops.linear import linear
from depthprune_runtime.ops.norm import add_rms_norm, head_rms_norm, rms_norm
from depthprune_runtime.ops.quantized_linear import quantized_linear
from depthprune_runtime.ops.rotary import rotary

__all__ = [
    "add_rms_norm",
    "gated_linear",
    "greedy",
    "head_rms_norm",
    "implementations",
    "kv_write",
    "linear",
    "paged_attention",
    "quantized_linear",
    "rms_norm",
    "rotary",
    "silu_mul",
    "varlen_attention",
]

_log = logging.getLogger("depthprune_runtime")

try:
    from depthprune_runtime import _C  # noqa: F401
except ImportError as error:
    _log.warning("C++ extension not loaded (%s): CPU ops run as plain torch; reinstall to build it", error)

if torch.version.cuda is not None and torch.cuda.is_available():
    try:
        from depthprune_runtime.kernels import gated_linear as _triton_gated_linear
        from depthprune_runtime.kernels import norm as _triton_norm
    except ImportError as error:
        _log.warning("Triton kernels not loaded (%s): CUDA ops run as plain torch; install triton", error)
    else:
        bind("add_rms_norm", _triton_norm.add_rms_norm, "CUDA")
        bind("gated_linear", _triton_gated_linear.gated_linear, "CUDA")
        bind("rms_norm", _triton_norm.rms_norm, "CUDA")
