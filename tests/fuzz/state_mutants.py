"""Mutants of the state of a search, and of folders of recurrent decoders."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import xxhash
from fuzz.bytes_mutants import mutate_bytes
from fuzz.folder_mutants import folder_mutant
from fuzz.json_mutants import Rules, mutate_json
from fuzz.mutation import Mutant

FILE = "state.json"


def _summed(state: bytes) -> bytes:
    """`state` with the checksum that fits, if it is an object."""
    try:
        parsed = json.loads(state)
    except (ValueError, RecursionError):
        return state
    text = json.dumps(parsed, sort_keys=True)
    checksum = xxhash.xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest()
    return state.rstrip().removesuffix(b"}") + f', "checksum": "{checksum}"}}'.encode()


def state_mutant(format: str, seed: int, original: str, files: Mapping[str, bytes]) -> Mutant:
    rng = random.Random(f"{format} {seed} mutant")
    if rng.random() < 0.15:
        made, mutation = mutate_bytes(rng, files[FILE], FILE)
    else:
        document = json.loads(files[FILE])
        del document["checksum"]
        made, mutation = mutate_json(rng, document, FILE, Rules(may_be_zero=("distance",)))
        made = _summed(made)
    return Mutant(format, seed, original, (mutation,), {**files, FILE: made}, FILE)


def other_mutant(format: str, seed: int, original: str, files: Mapping[str, bytes]) -> Mutant:
    mutant = folder_mutant(format, seed, original, files)
    return Mutant(format, seed, original, mutant.mutations, mutant.files)
