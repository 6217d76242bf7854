"""Mutants of our own file: the checksums are computed anew behind most changes, so that the loader sees them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from typing import Any

import xxhash
from fuzz.bytes_mutants import mutate_bytes
from fuzz.json_mutants import GENERATION_FIELDS, ODD_TEXTS, Rules, mutate_json, mutate_json_text
from fuzz.json_text import Raw
from fuzz.mutation import Mutant, Mutation
from fuzz.safetensors_file import TensorFile, take_apart

HEAD = "model.safetensors"
_OWN = Rules(defaults=True)
_HEADER = Rules()
_LIBRARY = Rules(defaults=True, last_wins=True, opaque=True)
_CONFIG = Rules(defaults=True, last_wins=True)
_GENERATION = Rules(defaults=True, last_wins=True, fields=GENERATION_FIELDS)
_ASSET_RULES = {
    "tokenizer.json": _LIBRARY,
    "tokenizer_config.json": _CONFIG,
    "generation_config.json": _GENERATION,
}
# longer jobs after loading, one for each mutant; most have none
EXTRAS = ("", "", "", "", "", "", "import", "import", "prune", "repair", "quantize")


def tensor_checksum(dtype: str, shape: list[int], data: bytes) -> str:
    return xxhash.xxh3_64(f"{dtype}{shape}".encode() + data).hexdigest()


def text_checksum(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


class NativeFile:
    """A head with its shards, taken apart."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.head = take_apart(files[HEAD])
        self.shards = {name: take_apart(data) for name, data in files.items() if name != HEAD}
        self.content = json.loads(self.head.metadata["depthprune"])

    def repair_tensors(self) -> None:
        """Checksums of all tensors, as they are now."""
        for file in (self.head, *self.shards.values()):
            for t in file.tensors:
                self.content["checksums"][t.name] = tensor_checksum(t.dtype, t.shape, t.data)
        guard = [t.name for t in self.head.tensors if t.name == "model.norm.weight"]
        assert guard, "the guard tensor has another name now"

    def assemble(
        self,
        content: bytes | None = None,
        header: bytes | None = None,
        shard_headers: Mapping[str, bytes] | None = None,
        names: bool = True,
    ) -> dict[str, bytes]:
        """Files with every checksum that is not given right. content: text of the description; header: of the head's
        tensors; shard_headers: by the shard's old name; names: call shards by their checksums, as writers do."""
        files: dict[str, bytes] = {}
        self.content = copy.deepcopy(self.content)
        for old, shard in self.shards.items():
            sums = {t.name: tensor_checksum(t.dtype, t.shape, t.data) for t in shard.tensors}
            if isinstance(shard.metadata, dict):
                shard.metadata["checksums"] = json.dumps(
                    {n: sums.get(n, "") for n in json.loads(shard.metadata["checksums"])}, separators=(",", ":")
                )
            data = shard.assemble((shard_headers or {}).get(old))
            length = 8 + int.from_bytes(data[:8], "little")
            checksum = text_checksum(data[:length])
            new = f"{old[: old.rindex('-')]}-{checksum[:16]}.safetensors" if names else old
            files[new] = data
            self.content["shards"] = {new if k == old else k: v for k, v in self.content["shards"].items()}
            self.content["shards"][new] = checksum
            self.content["weight_map"] = {k: new if v == old else v for k, v in self.content["weight_map"].items()}
        text = json.dumps(self.content, separators=(",", ":")).encode() if content is None else content
        self.head.metadata = {
            "format": "depthprune",
            "depthprune": text.decode("utf-8", "surrogateescape"),
            "checksum": text_checksum(text),
        }
        files[HEAD] = self.head.assemble(header)
        return files


def _part(rng: random.Random, content: Mapping[str, Any]) -> str:
    """A part of the description; the interesting ones more often than their size or number says."""
    weights = {"spec": 5, "plan": 4, "provenance": 3, "quantization": 3, "shards": 3, "weight_map": 2, "checksums": 2}
    keys = list(content)
    return rng.choices(keys, [weights.get(k, 1) for k in keys])[0]


def _description(rng: random.Random, file: NativeFile) -> tuple[dict[str, bytes], Mutation]:
    """The JSON inside the metadata."""
    if rng.random() < 0.25:
        text, mutation = mutate_json(rng, file.content, "description", _OWN)
        return file.assemble(content=text), mutation
    part = _part(rng, file.content)
    value = file.content[part]
    if not isinstance(value, dict | list):
        text, mutation = mutate_json(rng, file.content, "description", _OWN)
    else:
        inner, inside = mutate_json(rng, value, part, _OWN)
        whole = dict(file.content) | {part: Raw(inner.decode("utf-8", "surrogateescape"))}
        from fuzz.json_text import dumps

        text = dumps(whole).encode("utf-8", "surrogateescape")
        mutation = Mutation(inside.kind, part, (part, *inside.path), inside.meant)
    if mutation.path and mutation.path[0] in ("plan", "provenance", "checksums"):
        # these describe the model and do not make it
        mutation = Mutation(mutation.kind, mutation.document, mutation.path, False)
    return file.assemble(content=text), mutation


def _headers(rng: random.Random, file: NativeFile) -> tuple[dict[str, bytes], Mutation]:
    """The safetensors header of the head or of a shard; checksums over it are right."""
    file.assemble()
    target = rng.choice([HEAD, *file.shards])
    part: TensorFile = file.head if target == HEAD else file.shards[target]
    text, mutation = mutate_json(rng, part.header(), "header", _HEADER)
    mutation = Mutation(mutation.kind, "header", mutation.path, False)
    if target == HEAD:
        return file.assemble(header=text), mutation
    return file.assemble(shard_headers={target: text}), mutation


def _assets(rng: random.Random, file: NativeFile) -> tuple[dict[str, bytes], Mutation]:
    """Tokenizer, its config, chat template, generation config."""
    name = rng.choice([t.name for t in file.head.tensors if t.name.startswith("assets.")])
    tensor, short = file.head.find(name), name.removeprefix("assets.")
    if short in _ASSET_RULES:
        tensor.data, mutation = mutate_json(rng, json.loads(tensor.data), short, _ASSET_RULES[short])
    else:
        tensor.data, mutation = mutate_template(rng, tensor.data, short)
    tensor.shape = [len(tensor.data)]
    file.repair_tensors()
    return file.assemble(), mutation


def mutate_template(rng: random.Random, data: bytes, name: str) -> tuple[bytes, Mutation]:
    """A chat template: other programs, and text that is no template."""
    if rng.random() < 0.3:
        changed, mutation = mutate_json_text(rng, data, name)
        return changed, Mutation(mutation.kind, name, (), True)
    program = rng.choice(
        (
            "{{ messages[99].content }}", "{{ 1 / 0 }}", "{{ 2 ** (10 ** 9) }}",
            "{% for a in range(10 ** 9) %}{% endfor %}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10 ** 10 }}",
            "{{ raise_exception('no \x1b[31m') }}", "{{ messages.__class__.__mro__ }}", "{{ ''.join(messages) }}", "{{",
            "{% if %}", "{% include 'x' %}", "{% import 'os' as o %}{{ o }}", "{{ self }}", "{{ messages | tojson }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ [0] * 10 ** 10 }}", "{{ '%999999999d' % 1 }}",
            "{{ messages | sum }}", "{{ cycler.__init__.__globals__ }}", "{% generation %}x{% endgeneration %}", "",
            "{{ 'x'.encode('rot13') }}", "{{ 1e400 | int }}", "{{ '9' * 9999 | int }}", "{{ strftime_now('%Y' * 9) }}",
            "{{ messages[0]['content'][5].x.y }}", "{% set x = namespace(a=1) %}{{ x.b.c }}", "\x00{{ '\ud83d' }}",
            "{{ '(' * 9 }}" + "{{ (" * 300 + "1" + ") }}" * 300, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
            "{{ 'a' | indent(10 ** 9) }}", "{{ 'a' | center(10 ** 10) }}", "{{ range(10 ** 9) | list }}",
        )
    )  # fmt: skip
    return program.encode("utf-8", "surrogatepass"), Mutation("template", name, (), True)


def _weights(rng: random.Random, file: NativeFile) -> tuple[dict[str, bytes], Mutation]:
    """Numbers of a tensor, with right checksums: another model, or one that is not finite."""
    owner: TensorFile = rng.choice([f for f in (file.head, *file.shards.values()) if len(f.tensors) > 1])
    tensor = rng.choice([t for t in owner.tensors if not t.name.startswith("assets.")])
    data = bytearray(tensor.data)
    kind = rng.choice(("flip", "ones", "zeros", "not finite", "noise"))
    place = rng.randrange(len(data)) & ~3
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "not finite":
        data[place : place + 4] = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff"))[
            : len(data)
        ]
    else:
        size = len(data)
        data = bytearray({"ones": b"\xff" * size, "zeros": bytes(size)}.get(kind) or rng.randbytes(size))
    tensor.data = bytes(data)
    file.repair_tensors()
    return file.assemble(), Mutation(f"weights {kind}", "weights", (tensor.name,), True)


def _tensors(rng: random.Random, file: NativeFile) -> tuple[dict[str, bytes], Mutation]:
    """Tensors with other names, dtypes or shapes, described and summed as they are."""
    owner: TensorFile = rng.choice([file.head, *file.shards.values()])
    tensor = rng.choice(owner.tensors)
    old = tensor.name
    kind = rng.choice(("dtype", "shape", "name", "drop", "twice", "flat"))
    if kind == "dtype":
        tensor.dtype = rng.choice(("F32", "F16", "BF16", "U8", "I8", "F64", "F8_E4M3", "BOOL", "I64", "", "f32"))
    elif kind == "shape":
        tensor.shape = rng.choice((tensor.shape[::-1], [*tensor.shape, 1], [1, *tensor.shape], [0, *tensor.shape]))
    elif kind == "flat":
        tensor.shape = [len(tensor.data)]
        tensor.dtype = "U8"
    elif kind == "name":
        tensor.name = rng.choice((*ODD_TEXTS, f"{old}x", "__metadata__", "assets.../x", "assets.", "n" * 70_000))
    elif kind == "drop":
        owner.tensors.remove(tensor)
    else:
        owner.tensors.append(copy.copy(tensor))
    sums = file.content["checksums"]
    if kind in ("name", "drop"):
        sums.pop(old, None)
        where = file.content.get("weight_map", {}).pop(old, None)
        if kind == "name" and where is not None:
            file.content["weight_map"][tensor.name] = where
    if kind in ("name", "dtype", "shape", "flat"):
        sums[tensor.name] = tensor_checksum(tensor.dtype, tensor.shape, tensor.data)
    return file.assemble(), Mutation(f"tensor {kind}", "tensors", (old,), meant=old.startswith("assets."))


def _shard_names(rng: random.Random, file: NativeFile) -> tuple[dict[str, bytes], Mutation]:
    """Names of the shards in the head, with or without files of that name."""
    files = file.assemble()
    name = rng.choice([n for n in files if n != HEAD])
    new = rng.choice(
        (*ODD_TEXTS, f"/{name}", f"../{name}", f"./{name}", f"a/../{name}", "n" * 300, HEAD, ".", "", f"{name}/")
    )
    text = json.dumps(file.content).replace(json.dumps(name), json.dumps(new))
    if rng.random() < 0.5 and new and "/" not in new and "\x00" not in new and new not in (".", "..", HEAD):
        data = files.pop(name)
        files[new.encode("utf-8", "replace").decode()[:200]] = data
    others = {n: d for n, d in files.items() if n != HEAD}
    file.shards = {}
    return {**others, **file.assemble(content=text.encode())}, Mutation("shard name", "shards", (name,))


def _raw(rng: random.Random, files: Mapping[str, bytes]) -> tuple[dict[str, bytes], Mutation]:
    """Bytes, with no checksum repaired."""
    name = rng.choice(list(files))
    head = 8 + int.from_bytes(files[name][:8], "little")
    changed, mutation = mutate_bytes(rng, files[name], name, head)
    made = {**files, name: changed}
    if len(files) > 1 and rng.random() < 0.1:
        del made[name]
        mutation = Mutation("missing file", name)
    return made, mutation


def native_mutant(format: str, seed: int, original: str, files: Mapping[str, bytes]) -> Mutant:
    """One mutant of `files`; the seed decides everything about it."""
    rng = random.Random(f"{format} {seed} mutant")
    file = NativeFile(files)
    makers = {"raw": 3, "description": 8, "headers": 3, "assets": 3, "weights": 1, "tensors": 2}
    if file.shards:
        makers["shard names"] = 3
    maker = rng.choices(list(makers), list(makers.values()))[0]
    if maker == "raw":
        made, mutation = _raw(rng, files)
    else:
        functions = {
            "description": _description,
            "headers": _headers,
            "assets": _assets,
            "weights": _weights,
            "tensors": _tensors,
            "shard names": _shard_names,
        }
        made, mutation = functions[maker](rng, file)
    return Mutant(format, seed, original, (mutation,), made, HEAD, extra=rng.choice(EXTRAS))
