"""Every family against Transformers' own class of it: logits, tokens, dropped blocks, files."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from gguf_files import write_gguf

from depthprune_runtime import InputError, Runtime, SamplingParams
from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.families import FAMILIES, GGUF_FAMILIES
from depthprune_runtime.plan import Drop, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

SHORT = [1.0, 1.1, 1.3, 1.7, 2.0, 2.5]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": SHORT,
    "long_factor": [4.0] * 6,
    "original_max_position_embeddings": 64,
}
OPTIONS = [
    ("smollm3", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7}),
    ("phi3", {"sliding_window": 7, "rope_parameters": None}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    ("granite", {"tie_word_embeddings": True, "attention_bias": True}),
    ("seed_oss", {"attention_out_bias": True, "attention_bias": False}),
    ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True}),
    ("gemma3_text", {"final_logit_softcapping": 5.0, "tie_word_embeddings": True}),
]
PROMPTS = [[5, 9, 33, 70, 12], [8], [41, 3, 77, 19, 200, 133, 9, 8, 7, 6, 5, 4, 3]]
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def ids_of(length: int = 40) -> torch.Tensor:  # [2, S]
    return torch.randint(2, pico.VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


@functools.cache
def saved(family: str) -> tuple[object, Path]:
    """A pico model and its folder, made once."""
    model = pico.build_model(family)
    return model, pico.save(model, Path(tempfile.mkdtemp(prefix="pico-")), tokenizer=False)


@functools.cache
def loaded(family: str) -> Runtime:
    return Runtime.load(saved(family)[1], device="cpu")


@every_family
def test_logits_equal_transformers(family):
    with torch.no_grad():
        theirs = saved(family)[0](ids_of()).logits
    assert relative_error(loaded(family).logits(ids_of()), theirs) <= 1e-5


@pytest.mark.parametrize(("family", "changes"), OPTIONS)
def test_logits_of_config_options(family, changes, tmp_path):
    model = pico.build_model(family, **changes)
    with torch.no_grad():
        theirs = model(ids_of(60)).logits
    runtime = Runtime.load(pico.save(model, tmp_path, tokenizer=False), device="cpu")
    assert relative_error(runtime.logits(ids_of(60)), theirs) <= 1e-5


@every_family
def test_greedy_tokens_equal_transformers_alone_and_batched(family):
    """What Transformers finds most likely after every token of ours is the next token of ours."""
    runtime = loaded(family)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    alone = [runtime.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert [found.outputs[0].token_ids for found in runtime.generate(PROMPTS, params)] == alone
    for prompt, tokens in zip(PROMPTS, alone, strict=True):
        whole = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            likely = saved(family)[0](whole).logits[0].argmax(-1).tolist()
        assert list(tokens) == likely[len(prompt) - 1 : -1]
        assert len(tokens) == 32


@every_family
def test_a_dropped_block_is_a_layer_less_in_transformers(family, tmp_path):
    model, folder = pico.build_model(family), saved(family)[1]
    del model.model.layers[1]
    model.config.num_hidden_layers -= 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for i, kind in enumerate(model.config.layer_types) if i != 1]
    with torch.no_grad():
        theirs = model(ids_of(), use_cache=False).logits
    plan = PrunePlan("shortgpt", "", (Drop(2), Drop(3)), {})
    path = tmp_path / "pruned.dpr"
    write_native(path, PrunedCheckpoint(open_checkpoint(folder), plan))
    assert relative_error(Runtime.load(path, device="cpu").logits(ids_of()), theirs) <= 1e-5


@every_family
def test_a_file_holds_what_the_folder_does(family, tmp_path):
    path = tmp_path / "model.dpr"
    write_native(path, open_checkpoint(saved(family)[1]))
    runtime = Runtime.load(path, device="cpu")
    assert runtime.spec == loaded(family).spec
    assert torch.equal(runtime.logits(ids_of()), loaded(family).logits(ids_of()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(f.model_type for f in GGUF_FAMILIES.values()))
def test_gguf_logits_equal_transformers(family, tied, tmp_path):
    changes = {
        "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 4},  # llama.cpp knows no other
        "gemma2": {"query_pre_attn_scalar": 16, "num_hidden_layers": 4},
        "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window_pattern": 6},
    }
    model = pico.build_model(family, tie_word_embeddings=tied, **changes.get(family, {}))
    path = write_gguf(model, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path, torch.float32)
    with torch.no_grad():
        theirs = model(ids_of()).logits[0]
    ours = Runtime(checkpoint, torch.device("cpu"), torch.float32)
    assert relative_error(ours.logits(ids_of())[0], theirs) <= 1e-5
    assert checkpoint.provenance["family"] == family


def test_gguf_of_olmo3_is_refused(tmp_path):
    """It has the architecture of OLMo 2, and windows in some blocks."""
    path = write_gguf(pico.build_model("olmo2"), tmp_path / "m.gguf", metadata={"olmo2.attention.sliding_window": 9})
    with pytest.raises(InputError, match=r"olmo2\.attention\.sliding_window is not supported"):
        open_checkpoint(path)


def test_gguf_longrope(tmp_path):
    model = pico.build_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    factors = {
        "rope_factors_short.weight": np.array(SHORT, dtype=np.float32),
        "rope_factors_long.weight": np.full(6, 4.0, dtype=np.float32),
    }
    attention = math.sqrt(1 + math.log(pico.CONTEXT / 64) / math.log(64))
    metadata = {"phi3.rope.scaling.attn_factor": attention, "phi3.rope.scaling.original_context_length": 64}
    path = write_gguf(model, tmp_path / "m.gguf", extra=factors, metadata=metadata)
    with torch.no_grad():
        theirs = model(ids_of(60)).logits[0]
    runtime = Runtime(open_checkpoint(path, torch.float32), torch.device("cpu"), torch.float32)
    assert relative_error(runtime.logits(ids_of(60))[0], theirs) <= 1e-5
    assert runtime.spec.max_position_embeddings == 64


def test_longrope_ends_where_its_short_factors_do(tmp_path):
    model = pico.build_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    runtime = Runtime.load(pico.save(model, tmp_path, tokenizer=False), device="cpu")
    assert runtime.spec.max_position_embeddings == 64
    with pytest.raises(InputError, match="64"):
        runtime.logits(ids_of(65))
