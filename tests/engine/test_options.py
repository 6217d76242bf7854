"""Options of an engine: checked once, and typed wherever they are keywords."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import numpy as np
import pytest

from depthprune_runtime import AsyncEngine, EngineOptions, InputError, SamplingParams
from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.options import EngineFields, engine_options
from depthprune_runtime.engine.params import SamplingFields


@pytest.mark.parametrize(
    ("fields", "options", "aliases"),
    [(EngineFields, EngineOptions, {}), (SamplingFields, SamplingParams, {"max_new_tokens": "max_tokens"})],
)
def test_keywords_are_the_fields(fields, options, aliases):
    types = get_type_hints(options)
    expected = {f.name: types[f.name] for f in dataclasses.fields(options)}
    assert get_type_hints(fields) == expected | {name: types[field] for name, field in aliases.items()}
    assert not fields.__required_keys__


def test_values_are_plain_and_exact():
    options = EngineOptions(kv_memory="1.5GiB", max_num_seqs=np.int64(3), max_waiting=None)
    assert (options.kv_memory, options.max_num_seqs, options.max_waiting) == (1_610_612_736, 3, None)
    assert type(options.max_num_seqs) is int
    assert EngineOptions(kv_memory=0.25).kv_memory == 0.25
    assert EngineOptions(kv_memory=np.int64(4096)) == EngineOptions(kv_memory="4KiB")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.max_num_seqs = 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_memory": b"1GB"}, r"kv_memory: expected bytes \(2147483648 or '2GiB'\) or a fraction"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching: expected true or false, got 1"),
        ({"decode_steps": 0}, "decode_steps: expected an integer >= 1, got 0"),
        ({"max_n": 20000}, "max_n: expected an integer from 1 to 16384, got 20000"),
        ({"max_logprobs": -1}, "max_logprobs: expected an integer >= 0, got -1"),
        ({"max_num_seqs": 4096}, r"max_num_batched_tokens: expected an integer >= 4096 \(max_num_seqs\), got 2048"),
        ({"max_seqs": 4}, r"unknown engine options \['max_seqs'\]; known are \['kv_memory'"),
    ],
)
def test_what_is_out_of_range_is_refused_without_an_engine(pico_runtime, fields, message):
    with pytest.raises(InputError, match=message):
        engine_options(None, fields)
    with pytest.raises(InputError, match=message):
        pico_runtime.engine(**fields)


def test_an_engine_has_the_options_and_the_fields_that_replace_them(pico_runtime):
    base = EngineOptions(kv_memory="1MiB", max_num_seqs=8)
    engine = pico_runtime.engine(base, decode_steps=2)
    assert engine.options == EngineOptions(kv_memory=1 << 20, max_num_seqs=8, decode_steps=2)
    assert base.decode_steps == 8
    owner = pico_runtime.async_engine(base)
    assert isinstance(owner, AsyncEngine)
    owner.shutdown()
    with pytest.raises(InputError, match=r"options: expected EngineOptions, got \{'max_num_seqs': 8\}"):
        Engine(pico_runtime.decoder, engine.inputs, {"max_num_seqs": 8})
