"""Weights in huge pages: the same values, aligned, and freed with the model."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch

from depthprune_runtime import Runtime, import_model, quantize
from depthprune_runtime.host.huge_pages import HugePages, huge_pages_available
from depthprune_runtime.weights.weight import Format

needs_huge_pages = pytest.mark.skipif(not huge_pages_available(), reason="the system gives no huge pages")


@needs_huge_pages
def test_tensors_lie_in_order_and_aligned():
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.uint8), torch.randn(64, 64).bfloat16()]
    pages = HugePages(sum(HugePages.room(t.nbytes) for t in tensors))
    copies = [pages.copy(t) for t in tensors]
    starts = [c.data_ptr() for c in copies]
    assert starts == sorted(starts) and all(s % 64 == 0 for s in starts) and starts[0] % (2 << 20) == 0
    assert all(torch.equal(c, t) for c, t in zip(copies, tensors, strict=True))
    with pytest.raises(AssertionError, match="do not fit"):
        HugePages(64).empty((1 << 22,), torch.uint8)


@needs_huge_pages
@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_runs_the_same_from_copies_and_from_the_mapped_file(tmp_path, bits, monkeypatch):
    folder = pico.save(pico.build_model("llama"), tmp_path / "hf")
    path = tmp_path / "model.safetensors"
    if bits is None:
        import_model(folder, path)
    else:
        quantize(folder, path, bits=bits, method="rtn")
    copied = []
    plain = HugePages.copy
    monkeypatch.setattr(HugePages, "copy", lambda pages, tensor: copied.append(tensor.shape) or plain(pages, tensor))
    ids = list(range(3, 20))
    mapped = Runtime.load(path, mmap=True).logits(ids)
    assert not copied
    assert torch.equal(Runtime.load(path).logits(ids), mapped)
    assert len(copied) >= len(Runtime.load(path, mmap=True).spec.tensor_shapes())


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_projections_lie_in_panels(tmp_path, tied, monkeypatch):
    """Where the kernels like that; the logits are those of the rows, up to the order of their sums."""
    monkeypatch.setattr("depthprune_runtime.engine.loading.panels_pay", lambda: True)
    folder = pico.save(pico.build_model("llama", tie_word_embeddings=tied), tmp_path / "hf")
    path = tmp_path / "model.safetensors"
    import_model(folder, path, dtype="bfloat16")
    runtime, mapped = Runtime.load(path), Runtime.load(path, mmap=True)
    head = runtime.decoder.lm_head.weight
    assert head.format is Format.PANELS and torch.equal(head.dense(), mapped.decoder.lm_head.weight.dense())
    assert mapped.decoder.lm_head.weight.format is Format.ROWS
    assert (runtime.decoder.embed_tokens is head) == tied
    assert all(isinstance(s.output_weight, torch.Tensor) for s in runtime.decoder.sublayers)
    for length in (17, 90):
        ids = [i % 60 + 3 for i in range(length)]
        expected = mapped.logits(ids).float()
        assert (runtime.logits(ids).float() - expected).abs().max() <= 0.02 * expected.abs().max()
    tokens = runtime.generate([[3, 4, 5]], temperature=0, max_new_tokens=6, ignore_eos=True)[0].outputs[0].token_ids
    assert len(tokens) == 6


def test_plain_pages_where_the_system_gives_no_huge_ones(monkeypatch):
    monkeypatch.setattr("depthprune_runtime.host.huge_pages.huge_pages_available", lambda: False)
    tensors = [torch.randn(3, 5), torch.randn(64, 64).bfloat16()]
    pages = HugePages(sum(HugePages.room(t.nbytes) for t in tensors))
    copies = [pages.copy(t) for t in tensors]
    assert all(torch.equal(a, b) and a.data_ptr() % 64 == 0 for a, b in zip(copies, tensors, strict=True))


@needs_huge_pages
def test_the_memory_is_private_and_asks_for_huge_pages():
    tensor = HugePages(8 << 20).empty((8 << 20,), torch.uint8).fill_(1)
    mapping, found = "", {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            start, end = (int(x, 16) for x in fields[0].split("-"))
            mapping = fields[1] if start <= tensor.data_ptr() < end else ""
        elif mapping and fields[0] == "VmFlags:":
            found = {"permissions": mapping, "flags": fields[1:]}
    assert found["permissions"] == "rw-p"
    assert "hg" in found["flags"]
