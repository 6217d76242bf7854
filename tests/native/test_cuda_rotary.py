"""rotary and rotary_kv_write of csrc/cuda, bindings and kernels, emulated or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from accuracy import assert_as_accurate
from emulation import call
from torch import Tensor

from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.ops._library import REFERENCES
from depthprune_runtime.spec import RopeSpec

pytestmark = pytest.mark.usefixtures("target", "poisoned_memory")

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (T, H, K, D): scalar halves, odd counts, several heads a warp, more heads than a block holds, chunks read again.
SHAPES = [(3, 2, 1, 2), (4, 9, 3, 64), (2, 5, 2, 72), (2, 3, 1, 128), (2, 40, 4, 128), (2, 2, 1, 640), (1, 1, 1, 1040)]
POSITIONS = 50


def draw(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random values with one outlier channel, as trained models have."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., shape[-1] // 3] *= 1000
    return x.to(dtype)


@dataclass
class Case:
    """Arguments of rotary_kv_write: q, k and v are slices of one packed projection, the caches of one allocation."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    normed: bool = False
    wide_gain: bool = False
    shift: int = 0  # elements by which the packed projection and the caches miss their alignment
    slots: Tensor = field(init=False)  # [T]
    positions: Tensor = field(init=False)  # [T]

    def __post_init__(self) -> None:
        tokens, heads, kv_heads, dim = self.shape
        generator = torch.Generator().manual_seed(5)
        self.positions = torch.randint(0, POSITIONS, (tokens,), generator=generator)
        self.slots = torch.randperm(12, generator=generator)[:tokens]
        self.slots[1::3] = -1
        self.table = RotaryTable(RopeSpec(), dim, torch.device("cpu")).rows(POSITIONS)
        self.sizes = (heads, kv_heads, kv_heads)
        self.values = draw(0, tokens, sum(self.sizes), dim, dtype=self.dtype)
        gain_dtype = torch.float32 if self.wide_gain else self.dtype
        gains = [1 + 0.1 * torch.randn(size, dim, generator=generator) for size in (heads, kv_heads)]
        self.gains = [gain.to(gain_dtype) for gain in gains] if self.normed else [None, None]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Fresh packed projection [T, 1 + H + 2K + 1, D] and caches [2, N, P, K, D], NaN where nothing belongs."""
        tokens, _, kv_heads, dim = self.shape
        shapes = ((tokens, sum(self.sizes) + 2, dim), (3, 2, 4, kv_heads, dim))
        packed, caches = (
            torch.full((torch.Size(shape).numel() + 16,), torch.nan, dtype=self.dtype)[self.shift :][
                : torch.Size(shape).numel()
            ].view(shape)
            for shape in shapes
        )
        packed[:, 1:-1] = self.values
        return packed, caches.transpose(0, 1)

    def run(self, implementation: object) -> tuple[Tensor, Tensor]:
        packed, caches = self.tensors()
        q, k, v = packed[:, 1:-1].split(self.sizes, dim=1)
        arguments = (q, k, v, *self.gains, EPS, self.table, self.positions, caches[0], caches[1], self.slots)
        implementation(*arguments)  # type: ignore[operator]
        assert packed[:, 0].isnan().all()
        assert packed[:, -1].isnan().all()
        assert torch.equal(v, self.values[:, -self.sizes[2] :])
        return packed[:, 1:-1], caches

    def true(self) -> Tensor:  # [T, H + 2K, D]
        q, k, v = self.values.double().split(self.sizes, dim=1)
        rotated = []
        for x, gain in zip((q, k), self.gains, strict=True):
            y = x
            if gain is not None:
                y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * gain.double()
            cos, sin = self.table[self.positions].double()[:, None].unbind(2)
            a, b = y.chunk(2, dim=-1)
            rotated.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
        return torch.cat([*rotated, v], 1)


def fused(*arguments: object) -> None:
    call("rotary_kv_write", *arguments)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def stored(case: Case, packed: Tensor) -> Tensor:  # [2, N, P, K, D]
    """The caches that belong to the packed result: NaN but at the slots."""
    _, caches = case.tensors()
    _, k, v = packed.split(case.sizes, dim=1)
    for token, slot in enumerate(case.slots.tolist()):
        if slot >= 0:
            caches[0][slot // 4, slot % 4] = k[token]
            caches[1][slot // 4, slot % 4] = v[token]
    return caches


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_norm_it_is_torch_bit_for_bit(shape: tuple[int, int, int, int], dtype: torch.dtype, shift: int) -> None:
    case = Case(shape, dtype, shift=shift)
    packed, caches = case.run(fused)
    expected, expected_caches = case.run(REFERENCES["rotary_kv_write"])
    assert torch.equal(packed, expected)
    assert same(caches, expected_caches)
    assert same(caches, stored(case, packed))


@pytest.mark.parametrize("wide_gain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_norm(shape: tuple[int, int, int, int], dtype: torch.dtype, wide_gain: bool) -> None:
    case = Case(shape, dtype, normed=True, wide_gain=wide_gain)
    packed, caches = case.run(fused)
    expected, _ = case.run(REFERENCES["rotary_kv_write"])
    for name, actual, baseline, truth in zip(
        "qkv", *(x.split(case.sizes, dim=1) for x in (packed, expected, case.true())), strict=True
    ):
        assert_as_accurate(actual, baseline, truth, name)
    assert same(caches, stored(case, packed))
    moved, moved_caches = replace(case, shift=1).run(fused)
    assert torch.equal(packed, moved), "alignment must not change a result"
    assert same(caches, moved_caches)


@pytest.mark.parametrize("name", ["q", "k", "v", "q_norm", "k_norm", "cos_sin", "k_cache", "v_cache", "none"])
@pytest.mark.parametrize("how", ["address", "stride"])
def test_one_tensor_that_vectors_cannot_take(name: str, how: str) -> None:
    """Each tensor alone sends the launch to the scalar path; there a misaligned vector would end the process."""
    case = Case((3, 4, 2, 64), torch.float16, normed=True)
    expected, expected_caches = case.run(fused)
    q, k, v = case.values.split(case.sizes, dim=1)
    _, caches = case.tensors()
    names = ("q", "k", "v", "q_norm", "k_norm", "eps", "cos_sin", "positions", "k_cache", "v_cache", "slot_mapping")
    given = (q, k, v, *case.gains, EPS, case.table, case.positions, *caches, case.slots)
    arguments = dict(zip(names, given, strict=True))
    for key, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            arguments[key] = moved(x, how if key == name else "not at all")
    fused(*arguments.values())
    assert torch.equal(torch.cat([arguments[key] for key in "qkv"], 1), expected)
    assert same(torch.stack([arguments["k_cache"], arguments["v_cache"]]), expected_caches)


def moved(x: Tensor, how: str) -> Tensor:
    """The same values elsewhere, one element off a vector's address, or in rows of an odd length."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + int(how == "stride")), torch.nan, dtype=x.dtype)
    there = torch.full((wide.numel() + 8,), torch.nan, dtype=x.dtype)[int(how == "address") :][: wide.numel()]
    return there.view(wide.shape)[..., : x.shape[-1]].copy_(x)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gain_alone(which: int) -> None:
    case = Case((3, 4, 2, 64), torch.bfloat16, normed=True)
    both, _ = case.run(fused)
    plain, _ = Case(case.shape, case.dtype).run(fused)
    case.gains[1 - which] = None
    packed, _ = case.run(fused)
    for i, part in enumerate(packed.split(case.sizes, dim=1)):
        assert torch.equal(part, (both if i == which else plain).split(case.sizes, dim=1)[i])


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("shape", [(4, 9, 3, 64), (2, 2, 1, 640)])
def test_order_of_threads_and_tokens_do_not_matter(shape: tuple[int, int, int, int]) -> None:
    case = Case(shape, torch.bfloat16, normed=True)
    packed, caches = case.run(fused)
    again, again_caches = case.run(fused)
    assert torch.equal(packed, again)
    assert same(caches, again_caches)
    assert same(caches, stored(case, packed))
    for token in range(shape[0]):
        alone = Case((1, *shape[1:]), case.dtype, normed=True)
        alone.gains, alone.values = case.gains, case.values[token : token + 1]
        alone.positions, alone.slots = case.positions[token : token + 1], case.slots[token : token + 1]
        assert torch.equal(alone.run(fused)[0][0], packed[token])


@pytest.mark.parametrize("shape", [(0, 2, 1, 64), (5, 9, 3, 64), (2, 2, 2, 10), (1, 2, 1, 640)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_torch_bit_for_bit(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    for positions in (case.positions, case.positions.int(), case.positions.repeat_interleave(2)[::2]):
        packed, expected = case.values.clone(), case.values.clone()
        call("rotary", *packed.split(case.sizes, dim=1)[:2], case.table, positions)
        REFERENCES["rotary"](*expected.split(case.sizes, dim=1)[:2], case.table, positions)
        assert torch.equal(packed, expected)


def test_strided_last_dimension() -> None:
    case = Case((3, 4, 2, 64), torch.float16)
    expected = case.run(fused)[0].split(case.sizes, dim=1)
    q, k, v = (x.repeat_interleave(2, -1)[..., ::2] for x in case.values.split(case.sizes, dim=1))
    _, caches = case.tensors()
    fused(q, k, v, None, None, EPS, case.table, case.positions, caches[0], caches[1], case.slots)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert same(caches, stored(case, torch.cat([q, k, v], 1)))


def write(**changed: Tensor) -> None:
    """rotary_kv_write with good arguments, but for those that are given."""
    q, k, cache = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.ones(4, 2, 2, 8)
    slots = torch.tensor([5, 0, 2])
    names = ("q", "k", "v", "q_norm", "k_norm", "eps", "cos_sin", "positions", "k_cache", "v_cache", "slot_mapping")
    given = (q, k, k.clone(), None, None, EPS, torch.ones(16, 2, 4), slots.clone(), cache, cache.clone(), slots)
    fused(*(dict(zip(names, given, strict=True)) | changed).values())


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("q", torch.ones(3, 4, 7), r"shape \[T, H, D\] with an even D, got \[3, 4, 7\]"),
        ("k", torch.ones(3, 2, 8).half(), r"dtype Float \(that of q\), got Half"),
        ("v", torch.ones(3, 1, 8), r"shape \[3, 2, 8\] \(that of k\), got \[3, 1, 8\]"),
        ("q_norm", torch.ones(8), r"shape \[4, 8\], got \[8\]"),
        ("k_norm", torch.ones(2, 8).half(), r"dtype Float .*, got Half"),
        ("cos_sin", torch.ones(16, 2, 3), r"shape \[S, 2, 4\], got \[16, 2, 3\]"),
        ("positions", torch.zeros(2, dtype=torch.int64), r"shape \[3\], got \[2\]"),
        ("k_cache", torch.ones(4, 2, 2, 7), r"shape \[N, P, 2, 8\], got"),
        ("v_cache", torch.ones(3, 2, 2, 8), r"as many kv_blocks as k_cache, \[4, 2, 2, 8\], got \[3"),
        ("slot_mapping", torch.zeros(3, dtype=torch.int32), r"dtype int64 on \S+, got Int on"),
        ("slot_mapping", torch.zeros(3, dtype=torch.int64, device="meta"), r"dtype int64 on \S+, got Long on meta"),
    ],
)
def test_errors_name_the_argument(name: str, wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"rotary_kv_write: expected {name} of {message}"):
        write(**{name: wrong})


@pytest.mark.parametrize(("name", "beyond"), [("positions", 16), ("positions", -1), ("slot_mapping", 8)])
def test_beyond_the_table_or_the_cache(name: str, beyond: int, target: str) -> None:
    if target == "gpu":
        pytest.skip("a trap ends the use of CUDA in this process")
    with pytest.raises(RuntimeError, match="stopped by a trap"):
        write(**{name: torch.tensor([0, beyond, 1])})
