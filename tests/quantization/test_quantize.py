"""`quantize` from end to end: streaming is computing in memory, the file means what its codes say, mistakes are one
line."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json

import pico
import pytest
import torch

from depthprune_runtime import InputError, Runtime, ops, prune, quantize
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.cli import main
from depthprune_runtime.fitting import states
from depthprune_runtime.fitting.calibration import CalibrationSet
from depthprune_runtime.fitting.calibrator import Calibrator
from depthprune_runtime.fitting.options import RepairOptions
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder, SublayerLoader
from depthprune_runtime.progress import Progress
from depthprune_runtime.quantization.gptq import gptq
from depthprune_runtime.quantization.options import QuantizeOptions
from depthprune_runtime.quantization.quantize import quantized_view, requested
from depthprune_runtime.weights.quantized import QuantSpec
from depthprune_runtime.weights.weight import Format

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (6, 32), generator=torch.Generator().manual_seed(3))
QUANT = QuantSpec(4, 32)
SMALL = {"samples": 4, "seq_len": 32}


def view(file, mend=None):
    parent = open_checkpoint(file)
    data = CalibrationSet(WINDOWS, {"text": "random"})
    with torch.inference_mode():
        return quantized_view(parent, requested(parent, QUANT, 8), data, mend, CPU, Progress())


def hidden_after(checkpoint, ids):
    """Hidden states of the model that a checkpoint's dense tensors make."""
    decoder = Decoder(checkpoint.spec, checkpoint.tensor, CPU, checkpoint.dtype)
    return decoder.hidden_states(ids, packed([32] * (len(ids) // 32), CPU))


def in_memory(file):
    """GPTQ over all tokens at once with plain loops: name -> quantised weight."""
    checkpoint = open_checkpoint(file)
    found, batch = {}, packed([32] * len(WINDOWS), CPU)

    def tensor(name):
        return found[name].dense() if name in found else checkpoint.tensor(name)

    loader = SublayerLoader(checkpoint.spec, tensor, CPU, torch.float32)
    residual = checkpoint.tensor("embed_tokens.weight")[WINDOWS.flatten()]
    for i, spec in enumerate(checkpoint.spec.sublayers):
        first, second = (n for n in spec.tensor_shapes(72) if n.endswith("_proj.weight"))
        hidden = ops.rms_norm(residual, loader.sublayer(i).norm, checkpoint.spec.rms_norm_eps)
        for short, x in ((first, lambda: hidden), (second, lambda: loader.sublayer(i).inner(hidden, batch))):  # noqa: B023
            values, name = x(), f"sublayers.{i}.{short}"
            found[name] = gptq(tensor(name), values.T @ values / len(values), QUANT)
        residual = residual + loader.sublayer(i)(residual, batch)
    return found


def test_the_walk_is_gptq_in_memory(pico_file):
    streamed = view(pico_file)
    for name, expected in in_memory(pico_file).items():
        # sums in another order: a weight on the edge between two codes may take the other one
        assert (streamed.weight(name).codes == expected.codes).float().mean() > 0.995, name


def test_through_files_it_is_the_same(pico_file, tmp_path, monkeypatch):
    options = {"bits": 4, "group_size": 32, **SMALL}
    quantize(pico_file, tmp_path / "a", **options)
    monkeypatch.setattr(states, "MEMORY_LIMIT", 0)
    quantize(pico_file, tmp_path / "b", **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_calibrated_outputs_are_nearer_and_mended_ones_nearest(pico_file, tmp_path):
    quantize(pico_file, tmp_path / "rtn", 4, group_size=32, method="rtn")
    ids = WINDOWS.flatten()
    truth = hidden_after(open_checkpoint(pico_file), ids)

    def error(checkpoint):
        return float((hidden_after(checkpoint, ids) - truth).square().mean())

    rounded = error(open_checkpoint(tmp_path / "rtn"))
    compensated = error(view(pico_file))
    mended = error(view(pico_file, RepairOptions(lam=0.01)))
    assert mended < compensated < rounded


def test_the_mending_is_a_repair_of_the_pinned_ridge(pico_file, tmp_path):
    """The stored record and the codes: those of lam 0.05 and of no other."""
    quantize(pico_file, tmp_path / "q", 4, group_size=32, **SMALL)
    checkpoint = open_checkpoint(tmp_path / "q")
    assert checkpoint.provenance["quantization"]["mend"]["lam"] == 0.05
    name = next(n for n in checkpoint.quantization if n.endswith("11.down_proj.weight"))
    data = Calibrator(open_checkpoint(pico_file), "builtin", 4, 32, 0).windows(4, 32)

    def codes(lam):
        parent = open_checkpoint(pico_file)
        with torch.inference_mode():
            mend = RepairOptions(lam=lam)
            return quantized_view(parent, requested(parent, QUANT, 8), data, mend, CPU, Progress()).weight(name).codes

    written = checkpoint.weight(name).codes
    assert torch.equal(written, codes(0.05))
    assert not torch.equal(written, codes(0.5))
    assert not torch.equal(written, codes(0.005))


@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_are_those_of_the_dequantised_weights(pico_file, tmp_path, monkeypatch, symmetric):
    quantize(pico_file, tmp_path / "q", 4, group_size=32, symmetric=symmetric, method="rtn")
    checkpoint = open_checkpoint(tmp_path / "q")
    reference = ops._library.REFERENCES["quantized_linear"]

    def by_reference(x, w, bias=None, gated=False):
        return reference(x, w.codes, w.scales, w.zeros, bias, w.out_features, w.spec.bits, w.spec.group_size, gated)

    table = importlib.import_module("depthprune_runtime.ops.projection").OPS
    monkeypatch.setitem(table, Format.CODES, by_reference)
    ids, batch = WINDOWS[0], packed([32], CPU)

    def logits(weight, dtype):
        decoder = Decoder(checkpoint.spec, weight, CPU, dtype)
        return decoder.logits(decoder.hidden_states(ids, batch))

    found, dense = logits(checkpoint.weight, torch.float32), logits(checkpoint.tensor, torch.float32)
    # the reference multiplies by the very same matrix; another kernel may add its products in another order
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False)])
def test_families_and_tied_embeddings(tmp_path, family, tied):
    model = pico.build_model(family, num_hidden_layers=2, tie_word_embeddings=tied)
    result = quantize(pico.save(model, tmp_path / family), tmp_path / "q", 4, group_size=32, **SMALL)
    checkpoint = open_checkpoint(tmp_path / "q")
    head = "embed_tokens.weight" if tied else "lm_head.weight"
    assert {name for name, quant in result.quantization.items() if quant.bits == 8} == {head}
    assert checkpoint.bytes_per_token() == result.bytes_per_token
    assert (result.bytes_per_token == result.weight_bytes) == tied
    assert Runtime.load(tmp_path / "q", device="cpu").generate("the", max_new_tokens=2)


def test_prune_then_quantize(pico_file, tmp_path):
    prune(pico_file, tmp_path / "p", blocks=2, **SMALL)
    result = quantize(tmp_path / "p", tmp_path / "q", 8, group_size=32, lm_head_bits=16)
    checkpoint, parent = open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "p")
    assert (checkpoint.plan, checkpoint.spec) == (parent.plan, parent.spec)
    assert "lm_head.weight" not in result.quantization
    assert checkpoint.provenance["quantization"]["method"] == "rtn"
    assert result.parent_weight_bytes == parent.weight_bytes() > result.weight_bytes


def test_what_is_quantised_already_stays_or_is_refused(pico_file, tmp_path):
    quantize(pico_file, tmp_path / "q", 8, group_size=32)
    prune(tmp_path / "q", tmp_path / "p", blocks=1, **SMALL)  # some of its weights are dense again
    quantize(tmp_path / "p", tmp_path / "again", 8, group_size=32)
    before, after = open_checkpoint(tmp_path / "p"), open_checkpoint(tmp_path / "again")
    assert len(before.quantization) < len(after.quantization) == len(after.spec.projections())
    for name in before.quantization:
        assert torch.equal(before.weight(name).codes, after.weight(name).codes)
    with pytest.raises(InputError, match="quantise its dense parent"):
        quantize(tmp_path / "p", tmp_path / "four", 4, group_size=32)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("broken", ["self_attn.q_proj", "mlp.down_proj"])
def test_weights_that_are_not_finite_are_refused(tmp_path, method, broken):
    model = pico.build_model("llama", num_hidden_layers=1)
    model.get_submodule(f"model.layers.0.{broken}").weight.data[3, 5] = float("nan")
    folder = pico.save(model, tmp_path / "m")
    with pytest.raises(InputError, match="expected finite"):
        quantize(folder, tmp_path / "q", 4, group_size=32, method=method, **SMALL)
    assert not (tmp_path / "q").exists()


def run(capsys, *args):
    capsys.readouterr()
    try:
        status = main([str(a) for a in args])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_command(pico_file, tmp_path, capsys):
    path = tmp_path / "q.safetensors"
    command = ["quantize", pico_file, "-o", path, "--bits", 4, "--samples", 4, "--seq-len", 32]
    status, out, err = run(capsys, *command)
    assert status == 0
    assert "gptq, 4 bits in symmetric groups of 32, head 8 bits" in out
    assert "MB read a token" in out
    assert "gptq" in err  # the bar
    status, out, err = run(capsys, *command, "--asymmetric", "--method", "rtn", "--json", "-q", "--force")
    report = json.loads(out)
    assert (status, err, report["method"]) == (0, "", "rtn")
    assert report["quantization"]["sublayers.0.qkv_proj.weight"] == {"bits": 4, "group_size": 32, "symmetric": False}
    status, out, _ = run(capsys, "inspect", path)
    assert "24 projections of 4 bits in asymmetric groups of 32, 1 projections of 8 bits" in out
    assert "qkv_proj 4 bits, o_proj 4 bits" in out
    described = json.loads(run(capsys, "inspect", path, "--json")[1])
    assert described["bytes_per_token"] == report["bytes_per_token"] == open_checkpoint(path).bytes_per_token()
    assert described["sublayers"][1]["bits"] == {"gate_up_proj": 4, "down_proj": 4}
    assert described["head_bits"] == 8


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["--bits", 3], 2, "invalid choice"),
        (["--group", 48], 2, "invalid choice"),
        (["--lm-head-bits", 5], 2, "invalid choice"),
        (["--method", "magic"], 2, "invalid choice"),
        (["--bits", 4, "--calibration", "/nowhere"], 1, "no such file"),
        (["--bits", 4, "--seq-len", 999], 1, "at most the model's context"),
        (["--max-shard-size", "x"], 1, "max_shard_size"),
        (["--device", "toaster"], 1, "device"),
        (["-o", "/nowhere/q"], 1, "does not exist"),
        (["-o", "/dev/full"], 1, "regular file"),
    ],
)
def test_mistakes_are_one_line(pico_file, tmp_path, capsys, changes, status, message):
    code, out, err = run(capsys, "quantize", pico_file, "-o", tmp_path / "q", "-q", *changes)
    assert (code, out) == (status, "")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"group_size": 16}, {"symmetric": 1}, {"method": "awq"}, {"lm_head_bits": 3}]
)
def test_impossible_options_are_refused(pico_file, tmp_path, options):
    with pytest.raises(InputError, match="expected"):
        quantize(pico_file, tmp_path / "q", **options)
    assert not (tmp_path / "q").exists()


def test_the_defaults_have_one_home():
    """The keywords of `quantize` are the fields of its options."""
    keywords = inspect.signature(quantize).parameters
    fields = dataclasses.fields(QuantizeOptions)
    assert {f.name: f.default for f in fields} == {f.name: keywords[f.name].default for f in fields}
