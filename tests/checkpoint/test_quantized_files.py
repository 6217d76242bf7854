"""Checkpoints with quantised weights: they come back, mapped; damage is noticed; pruning keeps what it leaves alone."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash

from depthprune_runtime import InputError, Runtime, prune, quantize
from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.checkpoint.container import read_header
from depthprune_runtime.pruning.plan import Drop, Flatten, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

QKV = "sublayers.2.qkv_proj.weight"
PARTS = ("codes", "scales", "zeros")


@pytest.fixture(scope="module")
def quantized_file(pico_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "q.safetensors"
    quantize(pico_file, path, 4, group_size=32, symmetric=False, method="rtn")
    return path


def assert_same_codes(found: QuantizedWeight, expected: QuantizedWeight):
    assert (found.spec, found.shape) == (expected.spec, expected.shape)
    for part in PARTS:
        assert torch.equal(getattr(found, part), getattr(expected, part))


def test_the_description_lists_what_is_quantised(quantized_file, pico_file):
    checkpoint = open_checkpoint(quantized_file)
    assert list(checkpoint.quantization) == list(checkpoint.spec.projections())
    assert checkpoint.quantization[QKV] == QuantSpec(4, 32, False)
    assert checkpoint.quantization["lm_head.weight"] == QuantSpec(8, 32, False)
    assert b'"quantization"' not in pico_file.read_bytes()[:100_000]  # files without it are as before
    assert checkpoint.weight("embed_tokens.weight").dtype == torch.float32


def test_tensor_is_what_the_codes_stand_for(quantized_file):
    checkpoint = open_checkpoint(quantized_file)
    for name in checkpoint.quantization:
        weight = checkpoint.weight(name)
        assert isinstance(weight, QuantizedWeight)
        assert torch.equal(checkpoint.tensor(name), weight.dense(checkpoint.dtype))


def test_codes_are_mapped_and_aligned(quantized_file):
    checkpoint = open_checkpoint(quantized_file)
    for name in checkpoint.quantization:
        first, again = checkpoint.weight(name), checkpoint.weight(name)
        assert first.codes.data_ptr() == again.codes.data_ptr()
        assert first.codes.data_ptr() % 64 == 0


def test_it_loads_and_generates(quantized_file):
    assert len(Runtime.load(quantized_file, device="cpu").generate("the quick", max_new_tokens=4)[0].outputs) == 1


def test_shards_hold_the_same_model(quantized_file, tmp_path):
    one = open_checkpoint(quantized_file)
    write_native(tmp_path / "m.safetensors", one, max_shard_size=40_000)
    assert len(list(tmp_path.iterdir())) > 3
    many = open_checkpoint(tmp_path / "m.safetensors")
    assert many.quantization == one.quantization
    assert many.digest() == one.digest()
    for name in one.quantization:
        assert_same_codes(many.weight(name), one.weight(name))
    write_native(tmp_path / "one.safetensors", many)
    assert (tmp_path / "one.safetensors").read_bytes() == quantized_file.read_bytes()


def test_bytes_count_what_is_stored(quantized_file, pico_file):
    checkpoint, parent = open_checkpoint(quantized_file), open_checkpoint(pico_file)
    assert parent.bytes_per_token() == parent.spec.bytes_per_token(4)
    assert parent.weight_bytes() == 4 * parent.spec.num_parameters()
    stored = [checkpoint.weight(name) for name in checkpoint.spec.tensor_shapes()]
    assert checkpoint.weight_bytes() == sum(w.nbytes for w in stored)
    assert checkpoint.bytes_per_token() == checkpoint.weight_bytes() - stored[0].nbytes


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_in_any_part_is_noticed(quantized_file, tmp_path, part):
    data = bytearray(quantized_file.read_bytes())
    start, end = read_header(quantized_file)[f"{QKV}.{part}"]["data_offsets"]
    data[8 + int.from_bytes(data[:8], "little") + (start + end) // 2] ^= 8
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(InputError, match=rf"damaged: tensor {QKV}\.{part} has checksum"):
        open_checkpoint(tmp_path / "flipped")


def described(source, target, edit):
    """A copy of a file whose description `edit` has changed, checksum and all."""
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header["__metadata__"]["depthprune"])
    edit(content)
    text = json.dumps(content)
    header["__metadata__"] |= {"depthprune": text, "checksum": xxhash.xxh3_128(text.encode()).hexdigest()}
    changed = json.dumps(header).encode()
    target.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    return target


MISTAKES = {
    "another width": (lambda q: q[QKV].update(bits=8), "expected U8"),
    "another group": (lambda q: q[QKV].update(group_size=64), "damaged"),
    "unknown bits": (lambda q: q[QKV].update(bits=3), "bits: expected 8 or 4, got 3"),
    "missing field": (lambda q: q[QKV].pop("bits"), "missing keys"),
    "unknown field": (lambda q: q[QKV].update(colour=1), "unknown keys"),
    "a norm": (lambda q: q.update({"norm.weight": q[QKV]}), "expected names of projections, got norm.weight"),
    "not listed": (lambda q: q.pop(QKV), "not those that its description lists"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_description_that_lies_is_refused_in_one_line(quantized_file, tmp_path, case):
    edit, message = MISTAKES[case]
    changed = described(quantized_file, tmp_path / "lie", lambda content: edit(content["quantization"]))
    with pytest.raises(InputError, match=message) as raised:
        open_checkpoint(changed)
    assert "\n" not in str(raised.value)


def test_dropping_keeps_the_codes(quantized_file, tmp_path):
    parent = open_checkpoint(quantized_file)
    pruned = PrunedCheckpoint(parent, PrunePlan("test", "", (Drop(0), Drop(3))))
    write_native(tmp_path / "p", pruned)
    written = open_checkpoint(tmp_path / "p")
    assert len(written.quantization) == len(parent.quantization) - 4
    for name in written.spec.projections():
        assert_same_codes(written.weight(name), parent.weight(pruned._source(name)))
    assert_same_codes(written.weight("sublayers.1.qkv_proj.weight"), parent.weight(QKV))


def test_what_is_merged_or_solved_anew_is_dense(quantized_file, tmp_path):
    parent = open_checkpoint(quantized_file)
    merged = PrunedCheckpoint(parent, PrunePlan("test", "", (Flatten((1, 2)),)))
    gone = {n.split(".")[1] for n in parent.quantization} - {n.split(".")[1] for n in merged.quantization}
    assert gone == {"2", "3", "10", "11"}  # 2 and 3 are the merged ones, 10 and 11 what comes after has moved up from
    assert "sublayers.2.qkv_proj.weight" not in merged.quantization
    assert merged.weight("sublayers.2.qkv_proj.weight").dtype == parent.dtype
    prune(quantized_file, tmp_path / "r", blocks=2, samples=4, seq_len=32)
    repaired = open_checkpoint(tmp_path / "r")
    solved = set(repaired.spec.projections()) - set(repaired.quantization)
    assert solved
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in solved)


def test_the_digest_is_that_of_the_dense_model_of_the_same_values(quantized_file):
    parent = open_checkpoint(quantized_file)
    plain = PrunedCheckpoint(parent, PrunePlan("none", "", ()), {n: parent.tensor(n) for n in parent.quantization})
    assert not plain.quantization
    assert plain.digest() == parent.digest()
