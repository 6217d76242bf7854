"""The student that can be trained says what the decoder says, over every shape."""

from __future__ import annotations

import dataclasses
import re

import pytest
import random_decoder
import torch
from specs import mixed_spec, plain_spec

from depthprune_runtime.healing.options import HealOptions
from depthprune_runtime.healing.parameters import Full, LowRank, part_rows
from depthprune_runtime.healing.student import Student
from depthprune_runtime.model.batch import packed
from depthprune_runtime.spec import AttentionSpec

CPU = torch.device("cpu")


def with_extras(spec):
    """Norms of heads and every bias, which families have one by one."""
    sublayers = [
        dataclasses.replace(s, qkv_bias=True, o_bias=True, qk_norm=True)
        if isinstance(s, AttentionSpec)
        else dataclasses.replace(s, down_bias=True)
        for s in spec.sublayers
    ]
    return dataclasses.replace(spec, sublayers=tuple(sublayers))


SPECS = {
    "plain": plain_spec(2),
    "mixed": mixed_spec(),
    "windowed": mixed_spec(window=5),
    "extras": with_extras(mixed_spec()),
    "attention alone": mixed_spec(kinds="aaa"),
    "FFN alone": mixed_spec(kinds="fF"),
    "tied": dataclasses.replace(plain_spec(2), tie_word_embeddings=True),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def student_of(spec, start, parameters=None, recompute=False):
    tensors = random_decoder.tensors(spec).__getitem__
    parameters = parameters or Full(spec, start, tensors, CPU, torch.float32)
    return Student(spec, start, parameters, CPU, recompute), parameters


def expected_states(spec, ids, stop):
    """What enters sub-layer `stop`, and the logits, by the decoder."""
    decoder = random_decoder.decoder(spec)
    batch = packed([len(ids)], CPU)
    with torch.no_grad():
        states = decoder.embed(torch.tensor(ids))
        for sublayer in decoder.sublayers[:stop]:
            states = states + sublayer(states.clone(), batch)
        return states.clone(), decoder.logits(decoder.hidden_states(torch.tensor(ids), batch))


def logits_of(spec, student, states):
    head = random_decoder.tensors(spec)[spec.head_name]
    return student.final(student.states(states[None]))[0] @ head.T


@specs
@pytest.mark.parametrize("start", [0, 1])
def test_logits_equal_those_of_the_decoder(spec, start):
    ids = torch.randint(0, spec.vocab_size, (23,), generator=torch.Generator().manual_seed(1)).tolist()
    states, expected = expected_states(spec, ids, start)
    found = logits_of(spec, student_of(spec, start)[0], states)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@specs
def test_every_parameter_has_a_finite_gradient(spec):
    ids = list(range(2, 19))
    states, _ = expected_states(spec, ids, 0)
    student, parameters = student_of(spec, 0)
    logits_of(spec, student, states).logsumexp(-1).sum().backward()
    for name, leaf in parameters.trained().items():
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0, name


def test_running_again_changes_no_gradient():
    spec = SPECS["extras"]
    states, _ = expected_states(spec, list(range(2, 19)), 0)
    gradients = []
    for recompute in (False, True):
        student, parameters = student_of(spec, 0, recompute=recompute)
        logits_of(spec, student, states).logsumexp(-1).sum().backward()
        gradients.append([leaf.grad for leaf in parameters.trained().values()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@specs
def test_additions_merge_into_the_weights(spec):
    """With additions as large as the weights, merged weights alone give the same logits."""
    tensors = random_decoder.tensors(spec)
    parameters = LowRank(spec, 1, tensors.__getitem__, CPU, torch.float32, HealOptions(rank=3, alpha=5.0))
    states, before = expected_states(spec, list(range(2, 19)), 1)
    assert (logits_of(spec, student_of(spec, 1, parameters)[0], states) - before).norm() <= 1e-5 * before.norm()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for leaf in parameters.trained().values():
            leaf.normal_(0.0, 0.3, generator=generator)
    trained = logits_of(spec, student_of(spec, 1, parameters)[0], states)
    changed = parameters.merged()
    assert set(changed) == {n for n in spec.projections() if re.match(r"sublayers\.[1-9]", n)}
    merged = Full(spec, 1, {**tensors, **changed}.__getitem__, CPU, torch.float32)
    found = logits_of(spec, student_of(spec, 1, merged)[0], states)
    assert (found - before).norm() > 0.1 * before.norm()
    assert (found - trained).norm() <= 1e-5 * trained.norm()


def test_queries_keys_values_gates_and_ups_have_additions_of_their_own():
    spec = plain_spec(1)
    assert part_rows(spec, "sublayers.0.qkv_proj.weight") == [32, 16, 16]
    assert part_rows(spec, "sublayers.1.gate_up_proj.weight") == [48, 48]
    assert part_rows(spec, "sublayers.1.down_proj.weight") == [32]
    parameters = LowRank(spec, 0, random_decoder.tensors(spec).__getitem__, CPU, torch.float32, HealOptions(rank=2))
    shapes = {name: tuple(leaf.shape) for name, leaf in parameters.trained().items()}
    assert shapes["sublayers.0.qkv_proj.weight.lora_A"] == (6, 32)
    assert shapes["sublayers.0.qkv_proj.weight.lora_B"] == (64, 2)
