"""The contract of every op: schema, plain-torch reference, wrapper with shapes.

Importing this package also binds what is built: the C++ extension (CPU, and CUDA where it was built for it) and, on a
machine with a CUDA device and Triton, the kernels of ops that C++ does not serve there. Who serves CUDA is said once in
the log; what is missing is said once, too, and the reference runs.
"""

from __future__ import annotations

import torch

from depthprune_runtime.host.extension import extension
from depthprune_runtime.ops._library import implementations
from depthprune_runtime.ops._triton import bind_triton
from depthprune_runtime.ops.activation import gelu_tanh_mul, silu_mul
from depthprune_runtime.ops.attention import paged_attention, varlen_attention
from depthprune_runtime.ops.divergence import js_reverse
from depthprune_runtime.ops.draw_tokens import draw_tokens
from depthprune_runtime.ops.gated_linear import gated_linear
from depthprune_runtime.ops.greedy import greedy
from depthprune_runtime.ops.kv_cache import kv_write
from depthprune_runtime.ops.linear import linear
from depthprune_runtime.ops.linear_add import linear_add
from depthprune_runtime.ops.next_tokens import next_tokens
from depthprune_runtime.ops.norm import add_rms_norm, head_rms_norm, rms_norm
from depthprune_runtime.ops.norm_linear import norm_gated_linear, norm_linear, norm_logits
from depthprune_runtime.ops.norm_qkv import norm_qkv
from depthprune_runtime.ops.panel_linear import pack_panels, panel_linear
from depthprune_runtime.ops.projection import projection
from depthprune_runtime.ops.quantized_linear import quantized_linear
from depthprune_runtime.ops.rotary import rotary
from depthprune_runtime.ops.rotary_kv_write import rotary_kv_write

__all__ = [
    "add_rms_norm",
    "draw_tokens",
    "gated_linear",
    "gelu_tanh_mul",
    "greedy",
    "head_rms_norm",
    "implementations",
    "js_reverse",
    "kv_write",
    "linear",
    "linear_add",
    "next_tokens",
    "norm_gated_linear",
    "norm_linear",
    "norm_logits",
    "norm_qkv",
    "pack_panels",
    "paged_attention",
    "panel_linear",
    "projection",
    "quantized_linear",
    "rms_norm",
    "rotary",
    "rotary_kv_write",
    "silu_mul",
    "varlen_attention",
]

extension()
if torch.version.cuda is not None and torch.cuda.is_available():
    bind_triton()
