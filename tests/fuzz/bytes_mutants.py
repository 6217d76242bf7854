"""Changes to bytes that know nothing of their meaning."""

from __future__ import annotations

import random

from fuzz.mutation import Mutation

_EDGE_INTS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def mutate_bytes(
    rng: random.Random, data: bytes, name: str, head: int | None = None, meant: bool = False
) -> tuple[bytes, Mutation]:
    """`data` with one change. head: length of the part that most changes should hit."""
    kind = rng.choice(("flip", "flip", "flips", "byte", "truncation", "extension", "removal", "insertion", "integer"))
    limit = len(data) if head is None or rng.random() < 0.2 else min(head, len(data))
    place = rng.randrange(max(1, limit))
    made = bytearray(data)
    if kind == "flip" and data:
        made[place] ^= 1 << rng.randrange(8)
    elif kind == "flips" and data:
        for _ in range(rng.randrange(2, 30)):
            made[rng.randrange(max(1, limit))] ^= 1 << rng.randrange(8)
    elif kind == "byte" and data:
        made[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == "truncation":
        cut = rng.choice((0, 1, 7, 8, 9, place, len(data) - 1, len(data) - 4, len(data) // 2))
        made = made[: max(0, cut)]
    elif kind == "extension":
        made += bytes(rng.choice((1, 3, 64, 4096))) if rng.random() < 0.5 else rng.randbytes(rng.choice((1, 64, 4096)))
    elif kind == "removal":
        del made[place : place + rng.choice((1, 4, 8, 64))]
    elif kind == "insertion":
        made[place:place] = rng.randbytes(rng.choice((1, 4, 8, 64)))
    elif kind == "integer":
        width = rng.choice((4, 8))
        value = rng.choice(_EDGE_INTS) & (2 ** (8 * width) - 1)
        made[place : place + width] = value.to_bytes(width, "little")
    return bytes(made), Mutation(kind, name, meant=meant)
