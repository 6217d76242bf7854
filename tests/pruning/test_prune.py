"""`prune` end to end on a pico model."""

from __future__ import annotations

import shutil

import pico
import pytest
import torch
from flat_options import arguments

from depthprune_runtime import FinerCutOptions, InputError, Runtime, prune
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.pruning.shortgpt.ranking import score_blocks
from depthprune_runtime.text.tokenizer import Tokenizer
from depthprune_runtime.texts import load_text, rows_joined

SMALL = {"samples": 4, "seq_len": 32}


def test_one_file_in_one_file_out(pico_llama, tmp_path):
    result = prune(pico_llama[1], tmp_path / "p.safetensors", blocks=2, **SMALL)
    checkpoint = open_checkpoint(tmp_path / "p.safetensors")
    assert checkpoint.spec == result.spec
    assert len(checkpoint.spec.sublayers) == 8
    assert checkpoint.plan == result.plan.to_json()
    assert checkpoint.plan["parent_digest"] == open_checkpoint(pico_llama[1]).digest()
    assert checkpoint.plan["settings"]["calibration"]["text"] == "builtin"
    assert result.sparsity == pytest.approx(1 - result.spec.num_parameters() / result.parent.num_parameters())
    (tmp_path / "alone").mkdir()
    moved = shutil.move(tmp_path / "p.safetensors", tmp_path / "alone" / "p.safetensors")
    assert str(Runtime.load(moved, device="cpu").generate("the quick", max_new_tokens=5, ignore_eos=True))


def test_every_source_gives_the_same_file(pico_llama, pico_file, tmp_path):
    prune(pico_llama[1], tmp_path / "a", sparsity=0.2, **SMALL)
    prune(pico_file, tmp_path / "b", sparsity=0.2, **SMALL)
    prune(pico_file, tmp_path / "c", sparsity=0.2, **SMALL)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_dropping_nothing_changes_nothing(pico_file, pico_runtime, tmp_path):
    prune(pico_file, tmp_path / "p", blocks=0, **SMALL)
    ids = list(range(2, 30))
    assert Runtime.load(tmp_path / "p", device="cpu").logits(ids).equal(pico_runtime.logits(ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of blocks, sublayers and sparsity, got none"),
        ({"blocks": 1, "sparsity": 0.1}, "exactly one"),
        ({"sublayers": 2}, "only finercut"),
        ({"blocks": 1, "method": "shortgpt", "options": FinerCutOptions()}, "options: expected ShortGPTOptions for"),
        ({"blocks": 1, "options": {"fast": True}}, "options: expected one of ShortGPTOptions, .*, got dict"),
        ({"blocks": 1, "method": "finercut", "score": "reverse"}, "method finercut: unknown options \\['score'\\]"),
        ({"blocks": 1, "repair": "glue"}, "repair: expected one of auto, ridge, none"),
        ({"sparsity": 0.1, "method": "flattengpt", "keep_width": 1.0}, "stay wide"),
        ({"blocks": 1, "method": "flattengpt", "keep_width": 2}, "keep_width: expected a number from 0.0 to 1.0"),
        ({"blocks": 3, "method": "flattengpt", "pairs_only": True}, "3 of 6 cannot merge \\(pairs"),
        ({"blocks": 4, "method": "flattengpt", "pairs_only": True, "repair": "none"}, "at most 3 fewer \\(pairs"),
        ({"blocks": 5, "method": "flattengpt"}, "5 of 6 cannot merge"),
        ({"blocks": 1, "method": "flattengpt", "selection": "after-repair", "repair": "none"}, "needs a repair"),
        ({"sublayers": 12, "method": "finercut"}, "sublayers: expected 0 to 11 of 12"),
        ({"blocks": 6}, "expected 0 to 5 of 6, got 6"),
        ({"blocks": "2"}, "got '2'"),
        ({"sparsity": 0.99}, "the most is"),
        ({"sparsity": "much"}, "sparsity: expected a number"),
        ({"blocks": 1, "method": "magic"}, "method: expected one of shortgpt"),
        ({"blocks": 1, "calibration": "/nowhere.txt"}, "no such file, and not one of builtin"),
        ({"blocks": 1, "samples": 10**6}, "calibration text is too short"),
        ({"blocks": 1, "seed": 1 << 70}, "seed: expected an integer from 0 to below"),
        ({"blocks": 1, "seed": "x"}, "seed: expected an integer"),
        ({"blocks": 1, "samples": 2.5}, "samples: expected an integer from 1 on, got 2.5"),
        ({"blocks": 1, "seq_len": "16"}, "seq_len: expected an integer from 1 on, got '16'"),
        ({"blocks": 1, "samples": 0}, "samples: expected an integer from 1 on, got 0"),
        ({"blocks": 1, "seq_len": pico.CONTEXT + 1}, "at most the model's context of 256"),
        ({"blocks": 1, "device": "toaster"}, "device"),
        ({"blocks": 1, "dtype": "int3"}, "dtype: expected auto"),
        ({"blocks": 1, "protect_last": "no"}, "protect_last: expected True or False, got 'no'"),
        ({"blocks": 1, "method": "finercut", "only": "heads"}, "only: expected one of attention, ffn"),
        ({"blocks": 1, "method": "finercut", "fast": 1}, "fast: expected True or False, got 1"),
        ({"blocks": 1, "method": "flattengpt", "pairs_only": "no"}, "pairs_only: expected True or False"),
        ({"blocks": 1, "score": "magic"}, "score: expected one of"),
    ],
)
def test_impossible_requests_write_nothing(pico_llama, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        prune(pico_llama[1], tmp_path / "p.safetensors", **arguments(SMALL | options))
    assert list(tmp_path.iterdir()) == []


def test_text_without_a_tokenizer_is_refused(pico_llama, tmp_path):
    folder = pico.save(pico_llama[0], tmp_path / "model", tokenizer=False)
    with pytest.raises(InputError, match="no tokenizer"):
        prune(folder, tmp_path / "p", blocks=1, **SMALL)


def test_bad_calibration_files(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8: byte 0xef at offset 2"):
        load_text(str(tmp_path / "latin1.txt"))
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08\0\0\0")
    with pytest.raises(InputError, match="damaged gzip"):
        load_text(str(tmp_path / "cut.gz"))


def test_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHPRUNE_DATA", str(tmp_path))
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(" \n = Title = \n \n Words . \n")
    text = load_text("wikitext2-test")
    assert rows_joined(text) == "\n\n".join(["", " = Title = \n", "", " Words . \n"])
    (tmp_path / "wikitext2" / "wiki.train.raw").write_text(text)
    assert load_text("wikitext2-joined") == "  = Title = \n   Words . \n"
    assert load_text("wikitext2") == text


def test_the_first_windows_of_the_text(pico_file, tmp_path):
    (tmp_path / "text").write_text(" ".join(f"the quick brown fox {n}" for n in range(200)))
    options = {"method": "shortgpt", "blocks": 1, "repair": "none", "calibration": str(tmp_path / "text"), **SMALL}
    first = prune(pico_file, tmp_path / "p", **options, seed=None).plan.settings
    tokenizer = Tokenizer(open_checkpoint(pico_file))
    ids = tokenizer.encode((tmp_path / "text").read_text(), add_special_tokens=False)[: 4 * 32]
    with torch.inference_mode():
        windows = torch.tensor(ids).view(4, 32)
        scores = score_blocks(open_checkpoint(pico_file), windows, torch.device("cpu"), torch.float32, lambda: None)
    assert first["scores"]["block-influence"] == pytest.approx(scores.block_influence)
    assert first["calibration"]["seed"] is None


def test_an_interrupted_prune_leaves_nothing(pico_file, tmp_path, monkeypatch):
    from depthprune_runtime.checkpoint import container

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(container, "checksum", interrupt)  # the writer's, in the middle of the file
    with pytest.raises(KeyboardInterrupt):
        prune(pico_file, tmp_path / "p.safetensors", blocks=1, **SMALL)
    assert list(tmp_path.iterdir()) == []
