"""Narrowing scores, compensation and repair against brute-force formulas; the walk's bookkeeping."""

from __future__ import annotations

import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import plain_spec

from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.fitting.projection import Moments, accumulate, solve
from depthprune_runtime.fitting.states import TokenStates, scratch_tensor
from depthprune_runtime.fitting.walk import Walk, segments
from depthprune_runtime.pruning.flattengpt import units as narrowing
from depthprune_runtime.pruning.flattengpt.options import FlattenGPTOptions
from depthprune_runtime.pruning.plan import Drop, Flatten, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint, layout
from depthprune_runtime.spec import AttentionSpec, FFNSpec

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (4, 40), generator=torch.Generator().manual_seed(0))


def activations(seed, tokens, width):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) * torch.rand(width, generator=generator)


def test_leverage_is_the_formula_and_not_the_printed_one():
    z = activations(0, 200, 12)
    gram = z.T @ z / 200
    lam = 10 * float(gram.diagonal().mean())
    expected = (gram @ torch.linalg.inv(gram + lam * torch.eye(12))).diagonal()
    scores = narrowing.leverage_scores(gram, 10.0)
    torch.testing.assert_close(scores, expected)
    printed = torch.linalg.inv(gram @ (gram + lam * torch.eye(12))).diagonal()
    assert torch.corrcoef(torch.stack((scores.argsort().argsort(), printed.argsort().argsort())).double())[0, 1] < 0
    assert narrowing.top_units(scores, 3) == tuple(sorted(scores.topk(3).indices.tolist()))


def test_group_importance_is_the_formula():
    spec = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=4, origin=(0,))
    z, weight = activations(1, 50, 24), activations(2, 10, 24)
    norms = weight.norm(dim=0)
    expected = [
        float((z[:, g * 8 : g * 8 + 8] * norms[g * 8 : g * 8 + 8]).pow(2).sum(1).mean().sqrt()) for g in range(3)
    ]
    importance = narrowing.group_importance(z.T @ z / 50, weight, spec)
    assert importance.tolist() == pytest.approx(expected)


def test_compensation_minimises_its_objective():
    z, weight = activations(3, 300, 10), activations(4, 5, 10)
    gram, columns = z.T @ z / 300, torch.tensor([0, 2, 3, 7])
    lam = 0.5 * float(torch.linalg.svdvals(z).square().sum()) / 300 / 10  # of the whole Gram matrix, not of S'GS
    ours = narrowing.compensated(gram, weight, columns, 0.5)
    free = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [free], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        value = (z[:, columns] @ free.T - z @ weight.T).pow(2).sum() / 300 + lam * (free - weight[:, columns]).pow(
            2
        ).sum()
        value.backward()
        return value

    optimiser.step(loss)
    torch.testing.assert_close(ours, free.detach(), atol=1e-6, rtol=1e-6)


def test_scores_and_compensation_share_ten_times_the_mean_singular_value():
    """The paper's C = Z'Z over the tokens, its formulas by plain inverses; where it says so, [C (C + lam I)^-1]_ii."""
    z, weight = activations(9, 120, 14), activations(10, 6, 14)
    c = z.T @ z
    lam = 10 * torch.linalg.svdvals(c).mean() * torch.eye(14, dtype=torch.float64)
    scores = (c @ torch.linalg.inv(c + lam)).diagonal()
    kept = scores.topk(7).indices.sort().values
    select = torch.eye(14, dtype=torch.float64)[:, kept]
    inverse = torch.linalg.inv(select.T @ c @ select + lam[:7, :7])
    down = inverse @ (select.T @ c @ weight.T + lam[:7, :7] @ select.T @ weight.T)  # [k, C]
    spec = FFNSpec(intermediate_size=14, origin=(0, 1))
    gram = c / 120  # a mean over the tokens gives the same
    assert narrowing.choose_units(gram, weight, spec, 7, FlattenGPTOptions().leverage_lam) == tuple(kept.tolist())
    ours = narrowing.compensated(gram, weight, kept, FlattenGPTOptions().leverage_lam)
    torch.testing.assert_close(ours, down.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [None, torch.tensor([1, 4, 5])])
def test_repair_minimises_its_objective(columns):
    z, target = activations(5, 400, 7), activations(6, 400, 3)
    weights = activations(7, 400, 1).abs() + 0.1
    moments = Moments(z.T @ (weights * z) / 400, z.T @ (weights * target) / 400)
    kept = z if columns is None else z[:, columns]
    start = activations(8, 3, kept.shape[1])
    ours = solve(moments, start, columns, 0.2)
    lam = 0.2 * float((kept.T @ (weights * kept) / 400).diagonal().mean())
    root = (weights / 400).sqrt()
    stacked = torch.cat((root * kept, lam**0.5 * torch.eye(kept.shape[1])))
    goal = torch.cat((root * target, lam**0.5 * start.T))
    torch.testing.assert_close(ours, torch.linalg.lstsq(stacked, goal).solution.T)


@st.composite
def plans(draw):
    """Random drops and flattens of 7 blocks."""
    edits, b = [], 0
    while b < 7:
        kind = draw(st.sampled_from(["keep", "keep", "block", "attention", "ffn", "pair", "three"]))
        if kind in ("pair", "three") and b + (2 if kind == "pair" else 3) <= 7:
            size = 2 if kind == "pair" else 3
            edits.append(Flatten(tuple(range(b, b + size))))
            b += size
            continue
        edits += [Drop(2 * b)] if kind in ("block", "attention") else []
        edits += [Drop(2 * b + 1)] if kind in ("block", "ffn") else []
        b += 1
    return PrunePlan("test", "", tuple(edits))


@settings(max_examples=300, deadline=None)
@given(plans(), st.sampled_from(["before", "after"]))
def test_segments_cover_teacher_and_student_once_in_order(plan, answers_for):
    spec = plain_spec(7)
    if len(plan.dropped()) == 14:
        return
    pieces = layout(spec, plan)
    found = segments(pieces, 14, answers_for)
    assert [i for s in found for i in s.teacher] == list(range(14))
    assert [i for s in found for i in s.pieces] == list(range(len(pieces)))
    for segment in found:
        assert segment.answered[-1] == frozenset(segment.teacher)
        for index, answered in zip(segment.pieces, segment.answered, strict=True):
            assert set(pieces[index].sources) <= answered
        for a, b in zip(segment.answered, segment.answered[1:], strict=False):
            assert a < b


def test_drops_are_answered_for_before_or_after():
    pieces = layout(plain_spec(4), PrunePlan("test", "", (Drop(2), Drop(3))))
    before = segments(pieces, 8, "before")
    after = segments(pieces, 8, "after")
    assert [s.teacher for s in before][:3] == [(0,), (1, 2, 3), (4,)]
    assert [s.teacher for s in after][:3] == [(0,), (1,), (2, 3, 4)]


def walk(pico_file, edits, visitor, **options):
    checkpoint = open_checkpoint(pico_file)
    student = PrunedCheckpoint(checkpoint, PrunePlan("test", "", edits))
    with torch.inference_mode():
        Walk(checkpoint, student, WINDOWS, CPU, torch.float32, **options).run(visitor)


def test_targets_and_states_are_the_residual_streams(pico_file, pico_llama):
    """Without an edit the student is the teacher: at every sub-layer its output reaches the target."""
    gaps = []

    def visit(v):
        for b in range(len(v.states)):
            reached = v.states.batch(b) + v.sublayer.project(v.inner(b))
            gaps.append(float((reached - v.target.batch(b)).norm() / v.target.batch(b).norm()))
        return v.sublayer

    walk(pico_file, (), visit, skip_equal=False)
    assert len(gaps) == 12
    assert max(gaps) < 1e-5


def test_a_bias_is_not_solved_for_twice(tmp_path):
    """Where the student is the teacher there is nothing to mend, with a bias of the output projection, too."""
    model = pico.build_model("llama", num_hidden_layers=1, attention_bias=True)
    seen = []

    def visit(v):
        seen.append(v.sublayer.output_bias is not None)
        solved = solve(accumulate(v, "none"), v.sublayer.output_weight, None, 0.05)
        torch.testing.assert_close(solved.float(), v.sublayer.output_weight, atol=1e-4, rtol=1e-4)
        return v.sublayer

    walk(pico.save(model, tmp_path), (), visit, skip_equal=False)
    assert seen == [True, False]


def test_the_stretch_before_the_first_edit_is_not_visited(pico_file):
    every, some = [], []

    def visit_into(seen):
        def visit(v):
            seen.append((v.index, v.states.values.clone(), v.target.values.clone()))
            return v.sublayer

        return visit

    walk(pico_file, (Drop(6),), visit_into(every), skip_equal=False)
    walk(pico_file, (Drop(6),), visit_into(some))
    assert [i for i, _, _ in some] == list(range(5, 11))  # from the FFN that answers for the dropped attention
    for (_, states, target), (_, expected_states, expected_target) in zip(some, every[5:], strict=True):
        assert torch.equal(states, expected_states)
        assert torch.equal(target, expected_target)


def test_the_targets_of_a_merged_pair(pico_file, pico_llama):
    """After the wide attention: the teacher's stream with both attentions' outputs and no FFN's."""
    model = pico_llama[0]
    outputs, entering = {}, {}
    hooks = []
    for i, block in enumerate(model.model.layers):
        hooks.append(block.register_forward_pre_hook(lambda _, a, i=i: entering.__setitem__(i, a[0])))
        hooks.append(block.self_attn.register_forward_hook(lambda _, __, o, i=i: outputs.__setitem__(i, o[0])))
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    seen = {}

    def visit(v):
        seen[v.piece.sources] = v.target.values.clone()
        return v.sublayer

    walk(pico_file, (Flatten((2, 3)),), visit)
    torch.testing.assert_close(seen[(4, 6)], entering[2] + outputs[2] + outputs[3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[(5, 7)], entering[4], atol=1e-4, rtol=1e-4)


def test_accumulated_moments_are_the_sums(pico_file, monkeypatch):
    def visit(v):
        moments = accumulate(v, "rms")
        z = torch.cat([v.inner(b) for b in range(len(v.states))]).double()
        target = torch.cat([v.target.batch(b) for b in range(len(v.states))]).double()
        states = torch.cat([v.states.batch(b) for b in range(len(v.states))]).double()
        weights = 1 / target.pow(2).mean(1, keepdim=True)
        torch.testing.assert_close(moments.gram.double(), z.T @ (weights * z) / len(z), atol=1e-6, rtol=1e-4)
        cross = z.T @ (weights * (target - states)) / len(z)
        torch.testing.assert_close(moments.cross.double(), cross, atol=1e-6, rtol=1e-4)
        return v.sublayer

    walk(pico_file, (Drop(4), Flatten((3, 4))), visit)


def test_large_buffers_live_in_files():
    small = scratch_tensor((10, 4), torch.float32, CPU, limit=160)
    large = scratch_tensor((10, 5), torch.float32, CPU, limit=160)
    large.fill_(3)
    assert float(large.sum()) == 150
    assert (small.shape, large.shape) == ((10, 4), (10, 5))
    states = TokenStates.empty(5, 8, 3, CPU, batch_tokens=17, limit=1)
    states.values.copy_(torch.arange(120.0).view(5, 8, 3))
    assert len(states) == 3
    assert torch.equal(torch.cat([states.batch(b) for b in range(3)]), torch.arange(120.0).view(40, 3))
