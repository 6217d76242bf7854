"""The AMX matrix product on any machine with AVX-512 BF16: csrc/cpu/panels/amx.cpp over an emulation of the tiles.

Where a machine has AMX, tests/ops run the real thing.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate
from built import built
from op_cases import plain
from torch import Tensor

from depthprune_runtime.weights.panels import to_panels

_C = built()
ROOT = Path(__file__).resolve().parents[2]
HARNESS = """
#include <initializer_list>

#include "cpu/panels/panels.h"
// Outputs in two pieces where they are enough, and tokens.
extern "C" void gemm(const void* x, const void* panels, const void* ups, const void* bias, void* out, long tokens,
                     long in_features, long out_features, long x_stride, bool gated) {
  using namespace depthprune;
  const auto half = [](const void* p) { return static_cast<const uint16_t*>(p); };
  const Gemm job{half(x), half(bias), static_cast<uint16_t*>(out), tokens, in_features, out_features, x_stride, gated};
  const int64_t cut = tokens >= 2 * kGemmTokens ? kGemmTokens : tokens;
  const int64_t step = gated ? kGemmAmx.gated_outputs : kGemmAmx.outputs;
  const int64_t split = out_features > step ? step : out_features;
  const auto* left = static_cast<const uint32_t*>(panels);
  const auto* right = static_cast<const uint32_t*>(ups);
  for (int64_t first : {int64_t{0}, split}) {
    const int64_t last = first == 0 ? split : out_features;
    if (first == last) continue;
    const int64_t offset = first / kGemmRows * job.panel_words();
    const uint32_t* up = gated ? right + offset : nullptr;
    kGemmAmx.run(job, left + offset, up, first, last, 0, cut);
    if (cut < tokens) kGemmAmx.run(job, left + offset, up, first, last, cut, tokens);
  }
}
"""

Product = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Product:
    if "avx512_bf16" not in _C.cpu_levels():
        pytest.skip("no AVX-512 BF16 here, which the kernel needs beside the tiles")
    folder = tmp_path_factory.mktemp("amx")
    harness = folder / "harness.cpp"
    harness.write_text(HARNESS)
    header = ROOT / "tests" / "native" / "amx_emulation.h"
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    command += [f'-DDEPTHPRUNE_AMX_EMULATION="{header}"', str(harness), str(ROOT / "csrc/cpu/panels/amx.cpp")]
    done = subprocess.run([*command, "-o", str(folder / "amx.so")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "amx.so"))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
        outputs = weight.shape[0] // (2 if gated else 1)
        out = torch.full((x.shape[0], outputs), torch.nan, dtype=x.dtype)
        panels = [to_panels(part) for part in weight.split(outputs)]
        pointers = [None if t is None else t.data_ptr() for t in (x, panels[0], panels[-1], bias, out)]
        sizes = [ctypes.c_long(n) for n in (x.shape[0], x.shape[1], outputs, x.stride(0))]
        library.gemm(*map(ctypes.c_void_p, pointers), *sizes, ctypes.c_bool(gated))
        return out

    return run


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# (T, outputs, K): whole tiles, then rests of tokens, outputs and K; odd K.
SHAPES = [(64, 32, 64), (33, 40, 96), (65, 17, 70), (100, 50, 33), (47, 1, 5), (32, 33, 577)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch(product: Product, shape: tuple[int, int, int], gated: bool, with_bias: bool) -> None:
    tokens, outputs, size = shape
    rows = outputs * (2 if gated else 1)
    x, weight = draw(tokens, size, seed=0), draw(rows, size, seed=1) * 0.2
    bias = draw(rows, seed=2) if with_bias else None
    reference = plain("gated_linear" if gated else "linear")
    truth = reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert_as_accurate(product(x, weight, bias, gated), reference(x, weight, bias), truth, "gemm_amx")


def test_what_lies_beside_a_row_is_not_read(product: Product) -> None:
    wide = torch.full((65, 90), torch.nan, dtype=torch.bfloat16)
    wide[:, :70] = draw(65, 70, seed=3)
    weight = draw(20, 70, seed=4)
    assert torch.equal(
        product(wide[:, :70], weight, None, False), product(wide[:, :70].contiguous(), weight, None, False)
    )


def test_a_token_depends_on_nothing_but_itself(product: Product) -> None:
    x, weight = draw(97, 70, seed=5), draw(40, 70, seed=6)
    whole = product(x, weight, None, False)
    assert torch.equal(product(x[17:60], weight, None, False), whole[17:60])
