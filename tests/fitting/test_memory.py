"""Models larger than memory: large buffers live in files, and the results are those of memory."""

from __future__ import annotations

import re
from pathlib import Path

import pico
import pytest
import torch
from flat_options import arguments
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import InputError, prune
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.fitting import linalg, states
from depthprune_runtime.fitting.calibration import stream_hidden_states
from depthprune_runtime.pruning.flattengpt.merging import merged_tensor
from depthprune_runtime.pruning.plan import Flatten, PrunePlan
from depthprune_runtime.pruning.spans import span_errors
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (6, 24), generator=torch.Generator().manual_seed(5))
METHODS = {
    "shortgpt": {"method": "shortgpt", "score": "block-influence"},
    "shortgpt, after-repair": {"method": "shortgpt", "score": "after-repair"},
    "flattengpt": {"method": "flattengpt"},
}


@pytest.fixture
def scratch(monkeypatch):
    """No buffer may stay in memory; the shapes of those that went to files."""
    monkeypatch.setattr(states, "MEMORY_LIMIT", 0)
    made = []
    plain = torch.from_file

    def from_file(*args, **kwargs):
        found = plain(*args, **kwargs)
        made.append(found)
        return found

    monkeypatch.setattr(torch, "from_file", from_file)
    return made


def mapped(tensor):
    """Whether the memory of `tensor` is mapped from a file of ours."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in re.match(r"(\w+)-(\w+)", line).groups())
        if first <= at < last:
            return "depthprune-" in line
    raise AssertionError


@pytest.mark.parametrize("case", METHODS)
def test_pruned_through_files_it_is_the_same_model(pico_file, tmp_path, scratch, monkeypatch, case):
    text = tmp_path / "text"
    text.write_text("".join(f"the fox {n} jumps over {n * n} dogs; " for n in range(300)))
    options = {"blocks": 2, "samples": 6, "seq_len": 24, "device": "cpu", "calibration": str(text), **METHODS[case]}
    streamed = prune(pico_file, tmp_path / "streamed", **arguments(options))
    sizes = {t.numel() for t in scratch}
    assert {6 * 24 * 72, 80 * 80} <= sizes  # hidden states, Gram matrix of an FFN
    assert all(mapped(t) for t in scratch)
    monkeypatch.setattr(states, "MEMORY_LIMIT", 1 << 30)
    count = len(scratch)
    in_memory = prune(pico_file, tmp_path / "memory", **arguments(options))
    assert len(scratch) == count
    assert streamed.plan == in_memory.plan
    one, other = open_checkpoint(tmp_path / "streamed"), open_checkpoint(tmp_path / "memory")
    for name in one.spec.tensor_shapes():
        torch.testing.assert_close(one.tensor(name), other.tensor(name))


def test_only_one_block_s_matrices_are_kept_while_spans_are_scored(pico_file, scratch, monkeypatch):
    """Gram matrices and factors, two of each, of one block at a time: at most 4 F^2 numbers more are alive."""
    alive, most = {}, [0]
    plain = linalg.cholesky_

    def counted(system):
        import weakref

        alive[id(system)] = weakref.ref(system)
        most[0] = max(most[0], sum(r() is not None for r in alive.values()))
        return plain(system)

    monkeypatch.setattr(linalg, "cholesky_", counted)
    with torch.inference_mode():
        span_errors(open_checkpoint(pico_file), WINDOWS, CPU, torch.float32)
    assert len(alive) >= 2
    assert most[0] <= 4  # the last block's may still be there while the next one's are made


def test_what_entered_a_block_is_still_there_when_it_ends(pico_file):
    """What `stream_hidden_states` promises, and ShortGPT relies on."""
    seen, entering = {}, {}
    with torch.inference_mode():
        for i, before, after in stream_hidden_states(open_checkpoint(pico_file), WINDOWS, CPU, torch.float32):
            if i:
                assert torch.equal(before, seen[i - 1])
                assert torch.equal(entering[i - 1], seen.get(i - 2, entering[i - 1]))
            entering[i] = before
            seen[i] = after.clone()
    assert len(seen) == 12


@pytest.mark.parametrize("short", ["gate_up_proj.weight", "qkv_proj.weight"])
def test_merged_projections_are_the_same_in_strips(pico_file, monkeypatch, short):
    from depthprune_runtime.pruning import surgery

    parent = open_checkpoint(pico_file)
    view = PrunedCheckpoint(parent, PrunePlan("test", "", (Flatten((1, 2)),)))
    sources = (2, 4) if short.startswith("qkv") else (3, 5)
    name = f"sublayers.{2 if short.startswith('qkv') else 3}.{short}"
    whole = merged_tensor(parent, sources, None, short).to(torch.float32)
    for nbytes in (1, 5 * 8 * whole.shape[0], 1 << 30):  # 1, 5 and all input columns at a time
        monkeypatch.setattr(surgery, "_STRIP_ROWS_BYTES", nbytes)
        assert torch.equal(view.tensor(name), whole)


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(2, 40),
    kept=st.integers(1, 40),
    seed=st.integers(0, 1000),
    strip=st.sampled_from([1, 500, 1 << 20]),
)
def test_linear_algebra_in_strips(size, kept, seed, strip):
    kept = min(size, kept)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(60, size, generator=generator, dtype=torch.float64)
    r = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    w = torch.rand(60, 1, generator=generator, dtype=torch.float64)
    columns = torch.randperm(size, generator=generator)[:kept].sort().values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "MEMORY_LIMIT", 0)
        patch.setattr(linalg, "_STRIP_BYTES", strip)
        patch.setattr(linalg, "_BLOCK", 7)
        patch.setattr(linalg, "_LEAST_PANEL", 3)
        whole = linalg.accumulate_(linalg.zeros((size, size), torch.float64, CPU), z, z, w)
        gram = linalg.mirror_(linalg.accumulate_gram_(linalg.zeros((size, size), torch.float64, CPU), z, w))
        torch.testing.assert_close(gram, whole)
        cross = linalg.accumulate_(linalg.zeros((size, 3), torch.float64, CPU), z, r, w)
        system = linalg.gather_symmetric(gram, columns)
        added = linalg.add_ridge_(system, 0.1)
        right = linalg.multiply(gram, cross, columns)
        assert mapped(system)
        assert mapped(right)
        expected = (z.T @ (w * z))[columns][:, columns]
        assert added == pytest.approx(0.1 * float(expected.diagonal().mean()))
        expected = expected + added * torch.eye(kept, dtype=torch.float64)
        torch.testing.assert_close(system, expected)
        torch.testing.assert_close(right, (z.T @ (w * z))[columns] @ (z.T @ (w * r)))
        before = right.clone()
        factor = linalg.cholesky_(system)
        assert factor.data_ptr() == system.data_ptr()
        torch.testing.assert_close(linalg.inverse_diagonal(factor), torch.linalg.inv(expected).diagonal())
        solution = linalg.cholesky_solve_(factor, right)
        assert solution.data_ptr() == right.data_ptr()
        torch.testing.assert_close(solution, torch.linalg.solve(expected, before), atol=1e-9, rtol=1e-6)
        assert linalg.inner_product(solution, before) == pytest.approx(float((solution * before).sum()))


def test_matrices_that_lapack_would_copy_are_refused():
    with pytest.raises(AssertionError, match="column-major"):
        linalg.cholesky_(torch.eye(5).double()[:, :4][:4])
    with pytest.raises(AssertionError, match="column-major"):
        linalg.cholesky_solve_(torch.eye(4), torch.ones(4, 3))


def test_a_system_that_is_not_positive_definite_is_an_error():
    with pytest.raises(InputError, match="larger ridge"):
        linalg.cholesky_(-torch.eye(3, dtype=torch.float64).T)


def test_batches_are_smaller_where_activations_are_wide(pico_file):
    spec = open_checkpoint(pico_file).spec
    assert states.batch_tokens(spec) == 4096
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "_BATCH_ELEMENTS", 10 * 2 * 80)  # ten tokens of gate and up; qkv is narrower: 240
        widest = max(2 * 80, 9 * 16 + 2 * 3 * 16)
        assert states.batch_tokens(spec) == 1600 // widest
        patch.setattr(states, "_BATCH_ELEMENTS", 1)
        assert states.batch_tokens(spec) == 1
