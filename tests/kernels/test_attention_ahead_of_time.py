"""The Triton attention kernels compile for sm_80 and sm_90 at the shapes that run, without a GPU.

What is gated: no value leaves the registers, shared memory fits, keys come in 16-byte copies, and the pipeline holds
several tiles (Triton takes fewer than num_stages promises where a load depends on another).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: ahead-of-time compilation is not checked")

from ahead_of_time import Launch, check, record

from depthprune_runtime.kernels import attention

BF16, FP16 = torch.bfloat16, torch.float16
BATCH, TOKENS, PAGE = 8, 1000, 16


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fresh, but shared by this module: shapes that run the same code compile once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def launch_of(
    kind: str,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    capability: int,
    batch: int = BATCH,
    window: int = 0,
) -> Launch:
    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    tokens = batch if kind == "decode" else TOKENS
    packed = torch.empty(tokens, heads + 2 * kv_heads, dim, dtype=dtype, device="meta")
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=1)
    cache = torch.empty(512, PAGE, kv_heads, dim, dtype=dtype, device="meta")
    bounds = integers(batch + 1)

    def call() -> None:
        if kind == "varlen":
            attention.varlen_attention(q, k, v, bounds, 0.1, window)
        else:
            tables, lengths = integers(batch, 256), integers(batch)
            attention.paged_attention(q, cache, torch.empty_like(cache), tables, lengths, bounds, 0.1, window)

    (launch,) = record(call, capability)  # one launch, and meta tensors have no values that a launcher could wait for
    return launch


def buffers(compiled: object, rows: int, columns: int) -> set[int]:
    """Tiles of K or V in flight: the first dimension of the pipeline's shared memory."""
    ttgir = compiled.asm["ttgir"]  # type: ignore[attr-defined]
    return {int(n) for n in re.findall(rf"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{rows}x{columns}x", ttgir)}


def layouts_of_keys(compiled: object) -> set[str]:
    """Warps along the rows and the columns of the tiles of K and V as they are read from shared memory."""
    ttgir = compiled.asm["ttgir"]  # type: ignore[attr-defined]
    names = set(re.findall(r"ttg\.local_load .* -> tensor<\d+x\d+x\w+, (#\w+)>", ttgir))
    return {
        found for name in names for found in re.findall(rf"{name} = #ttg\.blocked<.*warpsPerCTA = (\[.*?\])", ttgir)
    }


# heads, KV heads, head_dim: Llama-2-7B, Llama-3-8B, SmolLM2, Phi-2, Phi-3-mini, Gemma
SHAPES = [(32, 32, 128), (32, 8, 128), (9, 3, 64), (32, 32, 80), (32, 32, 96), (8, 1, 256)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "capability"),
    [*((*shape, BF16, 90) for shape in SHAPES), *((*shape, BF16, 80) for shape in SHAPES[:3]), (8, 1, 256, FP16, 80)],
)
def test_decode(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    launch = launch_of("decode", heads, kv_heads, dim, dtype, capability, batch=1)
    assert launch.arguments["SPLIT"]
    assert launch.grid[0] * launch.grid[1] >= {80: 108, 90: 132}[capability], "an SM is idle"
    compiled = check(launch, capability, tmp_path, vector_loads=True)
    if heads == kv_heads:
        assert layouts_of_keys(compiled) == {"[4, 1]"}, "a key lies across warps, which then wait for each other"
    assert buffers(compiled, launch.arguments["BLOCK_N"], launch.arguments["BLOCK_D"]) == {3}


def test_the_last_split_sees_the_others(tmp_path: Path) -> None:
    """Between the stores of a partial result and the ticket lies a barrier, and the ticket orders memory."""
    launch = launch_of("decode", 32, 8, 128, BF16, 90, batch=1)
    ptx = check(launch, 90, tmp_path).asm["ptx"]
    assert len(re.findall(r"\batom\.", ptx)) == 1
    ticket = re.search(r"atom\.global\.gpu\.acq_rel\.add", ptx)
    assert ticket
    before, after = ptx[: ticket.start()], ptx[ticket.end() :]
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert after.index("bar.sync") < after.index("ld.global.cg")
    assert "ld.global.b" not in after, "a partial result could come from a stale L1"


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8)])
def test_decode_on_a_full_device_takes_no_ticket(heads: int, kv_heads: int, tmp_path: Path) -> None:
    launch = launch_of("decode", heads, kv_heads, 128, BF16, 90, batch=64)
    assert launch.grid == (64 * kv_heads, 1)
    assert "atom." not in check(launch, 90, tmp_path, vector_loads=True).asm["ptx"]


@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads", "dim", "dtype", "window", "capability"),
    [
        ("varlen", 32, 32, 128, BF16, 0, 80),
        ("varlen", 32, 32, 128, BF16, 0, 90),
        ("varlen", 32, 8, 128, FP16, 0, 90),
        ("paged", 32, 8, 128, BF16, 4096, 80),
        ("paged", 32, 8, 128, BF16, 4096, 90),
        ("paged", 9, 3, 64, BF16, 0, 80),
        ("paged", 9, 3, 64, BF16, 0, 90),
        ("varlen", 32, 32, 80, BF16, 0, 80),
        ("varlen", 32, 32, 96, BF16, 0, 90),
        ("paged", 8, 1, 256, BF16, 4096, 80),
        ("paged", 8, 1, 256, BF16, 4096, 90),
    ],
)
def test_prefill(
    kind: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int, capability: int, tmp_path: Path
) -> None:
    launch = launch_of(kind, heads, kv_heads, dim, dtype, capability, window=window)
    compiled = check(launch, capability, tmp_path, vector_loads=True)
    assert min(buffers(compiled, launch.arguments["BLOCK_N"], launch.arguments["BLOCK_D"])) >= 2


@pytest.mark.parametrize("kind", ["varlen", "paged", "decode"])
def test_merged_heads_run_the_same_code(kind: str) -> None:
    """Two merged attentions (64 heads) differ from one (32) in grid and strides only."""
    one, two = (launch_of(kind, heads, heads, 128, BF16, 90, batch=64) for heads in (32, 64))
    constants = [p.name for p in one.kernel.params if p.is_constexpr]
    assert [one.arguments[n] for n in constants] == [two.arguments[n] for n in constants]
    assert one.options == two.options
    axis = 0 if kind == "decode" else 1
    assert two.grid[axis] == 2 * one.grid[axis]
