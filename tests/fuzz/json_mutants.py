"""Changes to a JSON document that know its structure."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fuzz.bytes_mutants import mutate_bytes
from fuzz.json_text import Pairs, Raw, dumps
from fuzz.mutation import Mutation

Path = tuple[str | int, ...]

_OTHER_TYPES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 1.5, "", "x", "1", [], {}, [0], [[]], {"a": 1}, [None])
_LARGE = (2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 1e30, 1e308, 65536, 10**9)
_ENDLESS = tuple(map(Raw, ("1" + "0" * 400, "1" + "0" * 5000, "1e400", "-1e400")))
_NOT_FINITE = tuple(map(Raw, ("NaN", "Infinity", "-Infinity")))
_DEPTHS = (50, 500, 5_000, 200_000)
_LENGTHS = (256, 1_000, 65_536, 1_000_000)
ODD_TEXTS = (
    "\x1b[31mred\x1b[0m", "two\nlines\r", "\u202eright to left", "nul\x00", "\ud800", "\x07\x08\x7f\x9b2J", "../../up",
    "/etc/passwd", "a/b", ".", "..", "%s%n{}{0}", "\u2028", "\ufeff", "e\u0301" * 40, "name with spaces", "\U0001f642",
)  # fmt: skip
_KINDS = (
    ("type", 8), ("large", 4), ("endless", 2), ("not finite", 2), ("negative", 3), ("zero", 2), ("step", 4),
    ("scale", 3), ("nest", 2), ("long", 2), ("odd text", 4), ("drop", 4), ("rename", 2), ("duplicate", 3), ("swap", 4),
    ("add", 2), ("empty", 1), ("repeat", 1), ("text", 2),
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """What a format's documents allow. defaults: a missing key has a documented default; last_wins: of duplicate
    keys the last counts; values: another value of the same type may change the result; opaque: the document belongs to
    a library, which alone says what its contents mean; fields: what the keys that are read may hold, where that is
    known key by key, and exchanged values are then judged by it; may_be_zero: numbers of which 0 is one like any
    other."""

    defaults: bool = False
    last_wins: bool = False
    values: bool = True
    opaque: bool = False
    fields: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    may_be_zero: tuple[str, ...] = ()


def _children(node: Any) -> list[str | int]:
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, list) else []


def pick(rng: random.Random, document: Any) -> Path:
    """A place in `document`: near the root as often as deep down, whatever the sizes of its parts."""
    path: list[str | int] = []
    node = document
    while keys := _children(node):
        if path and rng.random() < 0.2:
            break
        path.append(rng.choice(keys))
        node = node[path[-1]]
    return tuple(path)


def at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def _put(document: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    at(document, path[:-1])[path[-1]] = value
    return document


def json_type(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return repr(type(value))
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__


def _number(value: Any) -> bool:
    return json_type(value) == "number"


# 0 is a value of these like any other
_MAY_BE_ZERO = ("temperature", "top_k", "min_p", "bos_token_id", "eos_token_id", "pad_token_id")


def _documented(path: Path, new: Any, rules: Rules) -> bool:
    """Whether the owner of a key gives `new` a meaning although it differs from the old value in kind."""
    key = next((k for k in reversed(path) if isinstance(k, str)), "")
    if key in rules.may_be_zero and _number(new) and new == 0:
        return True
    if not rules.last_wins:  # a document of our own
        return False
    ids = new if isinstance(new, list) else [new]
    whole = bool(ids) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
    if key == "eos_token_id":  # one id or several
        return new is None or whole
    return new is None or (key in _MAY_BE_ZERO and _number(new) and new == 0)


def _id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _between(least: float, most: float, above: bool = False) -> Callable[[Any], bool]:
    """Numbers from `least` (`above`: more than it) to `most`."""
    return lambda value: (
        value is None or (type(value) in (int, float) and least <= value <= most and not (above and value == least))
    )


# generation_config.json; null is as if the key were missing, and all other keys are not read
GENERATION_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "do_sample": lambda value: value is None or isinstance(value, bool),
    "temperature": _between(0.0, 1e30),
    "top_k": lambda value: value is None or _id(value),
    "top_p": _between(0.0, 1.0, above=True),
    "min_p": _between(0.0, 1.0),
    "repetition_penalty": _between(0.0, 1e30, above=True),
    "eos_token_id": lambda value: (
        value is None or _id(value) or (isinstance(value, list) and bool(value) and all(map(_id, value)))
    ),
}


def _legal(old: Any, new: Any) -> bool:
    """Whether `new` may stand where `old` stood, as far as JSON types and signs tell."""
    if json_type(old) != json_type(new):
        return False
    if _number(old):
        whole = isinstance(new, int) or not isinstance(old, int) or float(new).is_integer()
        return bool(new > 0 and whole)
    if isinstance(old, list):
        return {json_type(v) for v in new} <= {json_type(v) for v in old}
    return True


def _replacement(rng: random.Random, kind: str, old: Any) -> Any:
    """A value of `kind` in place of `old`."""
    if kind == "type":
        return rng.choice([v for v in _OTHER_TYPES if json_type(v) != json_type(old)])
    if kind == "large":
        return rng.choice(_LARGE)
    if kind == "endless":
        return rng.choice(_ENDLESS)
    if kind == "not finite":
        return rng.choice(_NOT_FINITE)
    if kind == "negative":
        return -old if _number(old) and old > 0 and rng.random() < 0.5 else rng.choice((-1, -(2**31), -(2**63), -0.5))
    if kind == "zero":
        return rng.choice((0, 0.0, -0.0))
    if kind == "step":
        return old + rng.choice((-1, 1)) if _number(old) else f"{old}x" if isinstance(old, str) else not old
    if kind == "scale":
        return rng.choice((old * 2, old // 2, old * 1000)) if _number(old) else old
    if kind == "nest":
        depth = rng.choice(_DEPTHS)
        start, end = rng.choice((("[", "]"), ('{"a":', "}")))
        return Raw(start * depth + "1" + end * depth)
    if kind == "long":
        return rng.choice(("a", "\x1b", "é", "0")) * rng.choice(_LENGTHS)
    if kind == "odd text":
        return rng.choice(ODD_TEXTS)
    if kind == "empty":
        return type(old)() if isinstance(old, dict | list | str) else None
    assert kind == "repeat"
    return old * rng.choice((2, 100)) if isinstance(old, list | str) and len(old) < 5000 else [old] * 3


def _keys_changed(rng: random.Random, kind: str, document: Any, path: Path, rules: Rules) -> tuple[Any, bool]:
    """Mutators of keys rather than values."""
    parent, key = at(document, path[:-1]), path[-1]
    old = parent[key]
    if kind == "drop":
        del parent[key]
        return document, rules.defaults or isinstance(parent, list)
    if kind == "add":
        if isinstance(parent, list):
            parent.insert(int(key), copy.deepcopy(rng.choice(parent)))
            return document, True
        parent[rng.choice((*ODD_TEXTS, "unknown", "n" * 300))] = rng.choice(_OTHER_TYPES)
        return document, False
    if isinstance(parent, list):
        parent[key], other = parent[rng.randrange(len(parent))], old
        return document, json_type(parent[key]) == json_type(other)
    if kind == "rename":
        name = rng.choice((f"{key}x", str(key).upper(), f" {key}", rng.choice(ODD_TEXTS), "", *map(str, parent)))
        changed = {name if k == key else k: v for k, v in parent.items()}
        return _put(document, path[:-1], changed), rules.defaults
    assert kind == "duplicate"
    new = _replacement(rng, rng.choice(("type", "step", "zero")), old) if rng.random() < 0.8 else old
    pairs = Pairs([*parent.items(), (str(key), new)])
    if rng.random() < 0.3:
        pairs.reverse()
        new = old
    return _put(document, path[:-1], pairs), rules.last_wins and _legal(old, new)


def mutate_json(rng: random.Random, document: Any, name: str, rules: Rules) -> tuple[bytes, Mutation]:
    """UTF-8 text of `document` with one change, and what it was."""
    kind = rng.choices([k for k, _ in _KINDS], [w for _, w in _KINDS])[0]
    if kind == "text":
        text = dumps(document).encode()
        return mutate_json_text(rng, text, name)
    document = copy.deepcopy(document)
    path = pick(rng, document)
    meant: bool
    if path and kind in ("drop", "rename", "duplicate", "add"):
        document, meant = _keys_changed(rng, kind, document, path, rules)
    elif path and kind == "swap":
        other = pick(rng, document)
        first, second = at(document, path), at(document, other)
        if path[: len(other)] == other or other[: len(path)] == path:
            kind, meant = "no change", False
        else:
            document = _put(_put(document, path, second), other, first)
            if rules.fields:
                meant = all(good(document[key]) for key, good in rules.fields.items() if key in document)
            else:
                meant = rules.values and _legal(first, second) and _legal(second, first)
    else:
        kind = kind if kind not in ("drop", "rename", "duplicate", "add", "swap") else "type"
        old = at(document, path)
        new = _replacement(rng, kind, old)
        document = _put(document, path, new)
        meant = not isinstance(new, Raw) and rules.values and _legal(old, new)
        if (kind == "empty" and rules.defaults) or (not isinstance(new, Raw) and _documented(path, new, rules)):
            meant = True
    return dumps(document).encode(), Mutation(kind, name, path, meant or rules.opaque)


def mutate_json_text(rng: random.Random, text: bytes, name: str) -> tuple[bytes, Mutation]:
    """Changes below the level of JSON."""
    kind = rng.choice(("cut", "tail", "not utf-8", "utf-16", "byte order mark", "comment", "bytes", "nothing"))
    if kind == "cut":
        return text[: rng.randrange(len(text))], Mutation("json cut", name)
    if kind == "tail":
        return text + rng.choice((b"}", b"{}", b"\x00", b" \n\t", b"null")), Mutation("json tail", name)
    if kind == "not utf-8":
        place = rng.randrange(len(text))
        return text[:place] + rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80")) + text[place:], Mutation(kind, name)
    if kind == "utf-16":
        return text.decode().encode("utf-16"), Mutation(kind, name)
    if kind == "byte order mark":
        return b"\xef\xbb\xbf" + text, Mutation(kind, name)
    if kind == "comment":
        return b"// comment\n" + text, Mutation(kind, name)
    if kind == "nothing":
        return rng.choice((b"", b"null", b"[]", b"{}", b"1", b'"x"')), Mutation("json replaced", name, meant=True)
    changed, mutation = mutate_bytes(rng, text, name)
    return changed, Mutation(
        f"json {mutation.kind}", name, meant=True
    )  # a digit that turned into another cannot be seen


def parse(data: bytes) -> Any:
    return json.loads(data)
