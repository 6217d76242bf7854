"""What launchers ask of a tensor before a kernel reads or writes it by address."""

from __future__ import annotations

from torch import Tensor, device, dtype, float32, int32, int64

INTEGERS = (int64, int32)


def expect(
    op: str,
    name: str,
    t: Tensor,
    shape: tuple[int | str, ...],  # a letter: any size of at least 1
    dtypes: tuple[dtype, ...],
    on: device,
) -> None:
    """ValueError unless `t` has that shape and one of the dtypes, lies on that device, and is contiguous."""
    sizes = tuple(t.shape)
    fits = len(sizes) == len(shape) and all(
        size >= 1 if isinstance(wanted, str) else size == wanted for size, wanted in zip(sizes, shape, strict=True)
    )
    if not fits or t.dtype not in dtypes or t.device != on or not t.is_contiguous():
        kinds = " or ".join(str(kind) for kind in dtypes)
        raise ValueError(
            f"{op}: expected {name} of shape [{', '.join(map(str, shape))}] in {kinds}, contiguous, on {on}, "
            f"got {list(sizes)} in {t.dtype} on {t.device}"
        )


def expect_places(
    op: str, q_like: Tensor, head_dim: int, cos_sin: Tensor, positions: Tensor, slot_mapping: Tensor
) -> None:
    """The rotary table, and a position and a slot for each of the T tokens of `q_like` [T, ...]."""
    tokens, on = q_like.shape[0], q_like.device
    expect(op, "cos_sin", cos_sin, ("S", 2, head_dim // 2), (float32,), on)
    expect(op, "positions", positions, (tokens,), (int64,), on)
    expect(op, "slot_mapping", slot_mapping, (tokens,), (int64,), on)


def expect_caches(op: str, k_cache: Tensor, v_cache: Tensor, kind: dtype, on: device) -> None:
    """k_cache and v_cache of one shape [N, P, K, D], none of them 0."""
    expect(op, "k_cache", k_cache, ("N", "P", "K", "D"), (kind,), on)
    expect(op, "v_cache", v_cache, tuple(k_cache.shape), (kind,), on)
