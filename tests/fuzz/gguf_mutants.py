"""Mutants of GGUF files: counts, types and values of the fields, descriptions of the tensors, alignment, bytes."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Mapping

from fuzz.bytes_mutants import mutate_bytes
from fuzz.gguf_file import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    SCALARS,
    STRING,
    UINT32,
    UINT64,
    Field,
    GGUFFile,
    take_apart,
    text,
)
from fuzz.json_mutants import ODD_TEXTS
from fuzz.mutation import Mutant, Mutation
from fuzz.native_mutants import EXTRAS, mutate_template

FILE = "model.gguf"
_COUNTS = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1)
_NUMBERS = (0, 1, 2, 3, 7, 8, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, -1, -2, 10**9)
_FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e-6, 1e30, 3e38, float("inf"), float("-inf"), float("nan"), 0.5, 10000.0)
# tensor types of ggml, and numbers that are none
_TYPES = (*range(32), 34, 35, 39, 40, 255, 2**31, 2**32 - 1)
_DESCRIBES = ("general.", "tokenizer.ggml.pre")  # fields that name the model and do not make it
# fields that the runtime does not read by design: llama.cpp's own hints
_EXTRA_FIELDS: tuple[tuple[str, int, tuple[object, ...]], ...] = (
    ("{arch}.expert_count", UINT32, (0, 1, 8)),
    ("{arch}.rope.scaling.type", STRING, ("linear", "yarn", "none", "longrope", "\x1b[2J")),
    ("{arch}.rope.scaling.factor", FLOAT32, (0.0, 2.0, float("nan"), -1.0)),
    ("{arch}.rope.dimension_count", UINT32, (0, 4, 8, 7, 2**31)),
    ("{arch}.attention.key_length", UINT32, (0, 4, 8, 7, 2**31)),
    ("{arch}.attention.value_length", UINT32, (0, 4, 8, 7, 2**31)),
    ("{arch}.attention.sliding_window", UINT32, (0, 4, 2**31)),
    ("{arch}.attention.scale", FLOAT32, (0.0, 0.5, 2.0)),
    ("{arch}.logit_scale", FLOAT32, (0.0, 0.5, 2.0)),
    ("{arch}.vocab_size", UINT32, (0, 10, 384, 2**31)),
    ("{arch}.use_parallel_residual", BOOL, (0, 1)),
    ("general.alignment", UINT32, (0, 1, 3, 8, 16, 32, 64, 4096, 2**31)),
    ("split.count", UINT32, (0, 1, 2, 65535)),
    ("split.no", UINT32, (0, 1)),
    ("tokenizer.ggml.eot_token_id", UINT32, (0, 5, 383, 384, 2**31, 2**32 - 1)),
    ("tokenizer.ggml.eom_token_id", UINT32, (0, 5, 383, 384, 2**31, 2**32 - 1)),
    ("tokenizer.ggml.add_bos_token", BOOL, (0, 1, 2)),
    ("tokenizer.ggml.add_space_prefix", BOOL, (0, 1)),
    ("tokenizer.ggml.pre", STRING, ("llama-bpe", "smollm", "nonsense", "\x1b[2J", "")),
    ("tokenizer.chat_template", STRING, ("{{ messages }}", "{{", "")),
)


def _counts(rng: random.Random, file: GGUFFile) -> Mutation:
    which = rng.randrange(2)
    own = (len(file.infos), len(file.fields))[which]
    file.counts[which] = rng.choice((*_COUNTS, own + 1, own - 1))
    return Mutation("count", FILE, (("tensors", "fields")[which],))


def _number(rng: random.Random, old: Field) -> object:
    if old.type in (FLOAT32, FLOAT64):
        return rng.choice((*_FLOATS, old.value * 2, old.value + 1))
    return rng.choice((*_NUMBERS, old.value + 1, old.value - 1, old.value * 2))


def _value(rng: random.Random, file: GGUFFile) -> Mutation:
    """Another value of the same type."""
    f = rng.choice(file.fields)
    key = f.key.decode()
    if f.type == ARRAY:
        f.value = list(f.value)
        place = rng.randrange(len(f.value))
        kind = rng.choice(("item", "cut", "empty", "more", "swap"))
        if kind == "item":
            f.value[place] = rng.choice(ODD_TEXTS) if f.items == STRING else rng.choice((0, 1, 5, -1, 2**31, 99))
        elif kind == "cut":
            del f.value[place:]
        elif kind == "empty":
            f.value = []
        elif kind == "more":
            f.value += [f.value[place]] * rng.choice((1, 1000))
        else:
            other = rng.randrange(len(f.value))
            f.value[place], f.value[other] = f.value[other], f.value[place]
        return Mutation(f"array {kind}", FILE, (key,), meant=key.startswith("tokenizer."))
    if f.type == STRING:
        if key == "tokenizer.chat_template" and rng.random() < 0.7:
            f.value, _ = mutate_template(rng, f.value, key)
        else:
            f.value = rng.choice((*ODD_TEXTS, "", "x" * 100_000, f.value + b"x", b"\xff\xfe", b"\xc3"))
        return Mutation("string", FILE, (key,), meant=key.startswith("tokenizer."))
    new = _number(rng, f)
    f.value = new
    legal = isinstance(new, int | float) and new > 0 and new != float("inf")
    return Mutation("number", FILE, (key,), meant=legal or key.startswith("tokenizer."))


def _type(rng: random.Random, file: GGUFFile) -> Mutation:
    """A field of another type: its value converted, or its bytes as they were."""
    f = rng.choice(file.fields)
    key = f.key.decode()
    kind = rng.choice(("type", "type only", "array of one", "no such type", "array claim", "nested array"))
    if kind == "type":
        same = f.type == STRING  # so far: then it is another text
        f.type = rng.choice([*SCALARS, STRING])
        simple = f.value if not isinstance(f.value, list | bytes) else 1
        f.value = str(simple).encode() if f.type == STRING else simple
        return Mutation(kind, FILE, (key,), meant=same and f.type == STRING and key.startswith("tokenizer."))
    if kind == "type only":
        whole = GGUFFile([f], [], b"").assemble()
        f.raw = whole[24 + 8 + len(f.key) + 4 :][: 8 if f.type in (UINT64, INT64, FLOAT64) else 4]
        f.type = rng.choice([*SCALARS, STRING, ARRAY])
    elif kind == "array of one":
        f.items, f.type = (f.type if f.type != ARRAY else INT32), ARRAY
        f.value = f.value if isinstance(f.value, list) else [f.value] * rng.choice((1, 1, 2, 3))
        if f.items == INT32:
            f.value = [1, 2]
    elif kind == "no such type":
        f.type = rng.choice((13, 14, 255, 2**31, 2**32 - 1))
        f.raw = rng.randbytes(rng.choice((0, 4, 8)))
    elif kind == "array claim":
        f.type = ARRAY
        f.raw = struct.pack("<IQ", rng.choice([*SCALARS, STRING, ARRAY, 99]), rng.choice(_COUNTS)) + rng.randbytes(16)
    else:
        f.type = ARRAY
        f.raw = struct.pack("<IQ", ARRAY, 1) * rng.choice((1, 5, 1000, 100_000)) + struct.pack("<IQI", UINT32, 1, 7)
    return Mutation(kind, FILE, (key,))


def _keys(rng: random.Random, file: GGUFFile) -> Mutation:
    """Fields that are missing, twice there, or called otherwise."""
    kind = rng.choice(("drop", "rename", "twice", "key length", "order", "add"))
    f = rng.choice(file.fields)
    key = f.key.decode()
    if kind == "drop":
        file.fields.remove(f)
        return Mutation(kind, FILE, (key,), meant=True)  # missing fields have llama.cpp's defaults, or are refused
    if kind == "rename":
        f.key = text(rng.choice((*ODD_TEXTS, key + "x", key.upper(), "k" * 70_000, "")))[8:]
        return Mutation(kind, FILE, (key,), meant=True)
    if kind == "twice":
        other = copy.copy(f)
        if other.type in SCALARS:
            other.value = _number(rng, other)
        file.fields.insert(rng.choice((0, len(file.fields))), other)
    elif kind == "key length":
        f.key_length = rng.choice((*_COUNTS, len(f.key) + 1, len(f.key) - 1))
    elif kind == "order":
        rng.shuffle(file.fields)
    else:
        name, type, values = rng.choice(_EXTRA_FIELDS)
        arch = file.find("general.architecture").value.decode()
        name = name.format(arch=arch)
        file.fields = [f for f in file.fields if f.key != name.encode()]
        value = rng.choice(values)
        raw = bytes([int(str(value))]) if type == BOOL else None
        file.fields.append(Field(name.encode(), type, value, raw=raw))
        return Mutation("add", FILE, (name,), meant=True)
    return Mutation(kind, FILE, (key,))


def _infos(rng: random.Random, file: GGUFFile) -> Mutation:
    """Names, dimensions, types and places of tensors."""
    info = rng.choice(file.infos)
    name = info.name.decode()
    kind = rng.choice(("name", "drop", "twice", "dims", "dims count", "type", "offset", "exchange", "bias", "factors"))
    meant = False
    if kind == "name":
        info.name = text(rng.choice((*ODD_TEXTS, name + "x", "n" * 70_000, "", rng.choice(file.infos).name)))[8:]
    elif kind == "drop":
        file.infos.remove(info)
    elif kind == "twice":
        other = copy.copy(info)
        other.offset = rng.choice(file.infos).offset
        file.infos.append(other)
    elif kind == "dims":
        place = rng.randrange(len(info.dims))
        info.dims = list(info.dims)
        info.dims[place] = rng.choice((*_COUNTS, info.dims[place] + 1, info.dims[place] - 1, info.dims[place] * 2))
        if rng.random() < 0.3:
            info.dims.reverse()
    elif kind == "dims count":
        info.dims = rng.choice(([], [*info.dims, 1], [1, *info.dims], info.dims * 3, [1] * 1000, info.dims[:1]))
    elif kind == "type":
        info.type = rng.choice(_TYPES)
    elif kind == "offset":
        info.offset = rng.choice((*_COUNTS, info.offset + 32, info.offset + 1, info.offset - 32, len(file.data)))
    elif kind == "exchange":
        other = rng.choice([i for i in file.infos if i.dims == info.dims])
        info.name, other.name = other.name, info.name
        meant = True
    else:
        width = {"bias": info.dims[-1], "factors": 4}[kind]
        extra = copy.copy(info)
        prefix = name.removesuffix(".weight")
        extra.name = {"bias": f"{prefix}.bias", "factors": "rope_freqs.weight"}[kind].encode()
        extra.dims, extra.type = [width], 0
        file.data += bytes(-len(file.data) % 32)
        extra.offset = len(file.data)
        file.data += struct.pack("<f", rng.choice((1.0, 0.5, 0.0, float("nan")))) * width
        file.data += bytes(-len(file.data) % 32)
        file.infos.append(extra)
        name = extra.name.decode()
        meant = kind == "factors"
    return Mutation(f"tensor {kind}", FILE, (name,), meant)


def _whole(rng: random.Random, file: GGUFFile) -> Mutation:
    kind = rng.choice(("version", "magic", "alignment", "no data", "data"))
    if kind == "version":
        file.version = rng.choice((0, 1, 2, 4, 255, 2**24 * 3, 2**32 - 1))
    elif kind == "magic":
        file.magic = rng.choice((b"GGUX", b"FUGG", b"GGML", b"\x00\x00\x00\x00"))
    elif kind == "alignment":
        file.alignment = rng.choice((1, 8, 64, 4096))
    elif kind == "no data":
        file.data = b""
    else:
        file.data = rng.choice((bytes(len(file.data)), b"\xff" * len(file.data), rng.randbytes(len(file.data))))
    return Mutation(kind, FILE, (), meant=kind == "data")


def gguf_mutant(format: str, seed: int, original: str, files: Mapping[str, bytes]) -> Mutant:
    """One mutant of a GGUF file; the seed decides everything about it."""
    rng = random.Random(f"{format} {seed} mutant")
    extra = rng.choice(EXTRAS[:-1])
    data = files[FILE]
    if rng.random() < 0.2:
        head = len(data) - len(take_apart(data).data)
        made, mutation = mutate_bytes(rng, data, FILE, head, meant=True)
        return Mutant(format, seed, original, (mutation,), {**files, FILE: made}, FILE, extra=extra)
    file = take_apart(data)
    mutations = []
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        maker = rng.choices((_counts, _value, _type, _keys, _infos, _whole), (1, 5, 4, 4, 5, 1))[0]
        try:
            mutations.append(maker(rng, file))
        except (UnicodeDecodeError, StopIteration, IndexError, AttributeError, TypeError, ValueError):
            if not mutations:
                raise
    return Mutant(format, seed, original, tuple(mutations), {**files, FILE: file.assemble()}, FILE, extra=extra)
