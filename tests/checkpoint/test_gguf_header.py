"""GGUF headers: what the gguf package reads is read, and no claimed count is believed."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pico
import pytest
from gguf_files import write_gguf

from depthprune_runtime import InputError
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.checkpoint.gguf_header import read_gguf_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(tensors=0, fields=0, body=b"", version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def test_everything_the_gguf_package_reads_is_read(tmp_path):
    metadata = {
        "a.text": "naïve 東京", "a.bool": True, "a.float": 0.5, "a.texts": ["x", "", "東"], "a.ints": [1, -2, 3],
        "a.floats": [0.25, 1e9], "a.bools": [True, False],
    }  # fmt: skip
    path = write_gguf(pico.build_model("llama"), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F16, metadata=metadata)
    reader, ours = gguf.GGUFReader(path), read_gguf_header(path)
    assert {k: ours.metadata[k] for k in metadata} == metadata
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert dict(ours.metadata) == theirs
    assert list(ours.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, found.shape) == (tensor.tensor_type, tuple(int(n) for n in reversed(tensor.shape)))
        assert np.array_equal(ours.raw(tensor.name), np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8))


HUGE = 1 << 40
TENSOR = text("t") + struct.pack("<I", 1) + struct.pack("<Q", 8) + struct.pack("<IQ", 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF", "the version claims 4 bytes"),
        (header(version=1), "version 2 or 3, got 1"),
        (header(version=3 << 24), "big-endian"),
        (header(fields=HUGE), "metadata count of 1,099,511,627,776 claims"),
        (header(tensors=HUGE), "tensor count of 1,099,511,627,776 claims"),
        (header(fields=1, body=struct.pack("<Q", HUGE) + b"\0" * 9), "a metadata key claims"),
        (header(fields=1, body=text("k") + struct.pack("<IIQ", 9, 4, HUGE)), "metadata key k claims"),
        (header(fields=1, body=text("k") + struct.pack("<IIQ", 9, 8, HUGE)), "metadata key k claims"),
        (header(fields=1, body=text("k") + struct.pack("<IIQ", 9, 9, HUGE)), "arrays of value type 9"),
        (header(fields=1, body=text("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE)), "metadata key k ends beyond"),
        (header(fields=1, body=text("k") + struct.pack("<IQ", 8, HUGE)), "metadata key k claims"),
        (header(fields=1, body=text("k") + struct.pack("<IB", 77, 0)), "value type 77"),
        (header(fields=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 0)), "cannot be read"),
        (header(fields=2, body=2 * (text("k") + struct.pack("<IB", 0, 0))), "key k comes twice"),
        (header(fields=1, body=text("a\x1b[31m") + struct.pack("<IB", 77, 0)), r"key a\\x1b\[31m: value type 77"),
        (
            header(fields=1, body=text("general.alignment") + struct.pack("<II", 4, 0) + b"\0" * 8),
            "general.alignment: expected a power of two, got 0",
        ),
        (header(tensors=1, body=text("t") + struct.pack("<I", 1 << 31) + b"\0" * 64), "at most 4 dimensions"),
        (header(tensors=1, body=TENSOR.replace(struct.pack("<Q", 8), struct.pack("<Q", 1 << 63))), "does not fit F32"),
        (header(tensors=1, body=TENSOR.replace(struct.pack("<Q", 8), struct.pack("<Q", 0))), "does not fit F32"),
        (header(tensors=1, body=TENSOR), "tensor t ends at byte"),
        (header(tensors=1, body=TENSOR[:-12] + struct.pack("<IQ", 0, HUGE) + b"\0" * 99), "tensor t ends at byte"),
        (header(tensors=1, body=TENSOR[:-12] + struct.pack("<IQ", 4321, 0) + b"\0" * 99), "tensor type 4321"),
        (header(tensors=2, body=2 * TENSOR + b"\0" * 99), "tensor t comes twice"),
    ],
)
def test_damaged_headers_are_one_line_at_once(data, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=rf"m\.gguf: .*{message}") as error:
        open_checkpoint(tmp_path / "m.gguf")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_header_cut_anywhere_is_one_line(tmp_path):
    whole = write_gguf(
        pico.build_model("llama", num_hidden_layers=1), tmp_path / "m.gguf", metadata={"a.texts": ["x", "y"]}
    ).read_bytes()
    end = whole.index(b"output.weight") + 40
    for cut in range(4, end, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"cut\.gguf: "):
            read_gguf_header(tmp_path / "cut.gguf")


def test_data_that_does_not_follow_the_header_is_one_line(tmp_path):
    whole = write_gguf(pico.build_model("llama", num_hidden_layers=1), tmp_path / "m.gguf").read_bytes()
    place = whole.index(b"output_norm.weight") + 18 + 4 + 8  # its type, then its offset
    (offset,) = struct.unpack_from("<Q", whole, place + 4)
    start = min(t.offset for t in read_gguf_header(tmp_path / "m.gguf").tensors.values())
    shifted = whole[:start] + bytes(32) + whole[start:]  # the data of another alignment
    halves = whole[:place] + struct.pack("<I", 1) + whole[place + 4 :]  # half as many bytes: a gap behind them
    moved = whole[: place + 4] + struct.pack("<Q", offset - 32) + whole[place + 12 :]
    for damaged, message in (
        (shifted, rf"expected {len(whole):,} bytes, got {len(whole) + 32:,}"),
        (halves, r"expected offset [\d,]+, where the one before ends"),
        (moved, rf"output_norm\.weight: expected offset {offset:,}, .* got {offset - 32:,}"),
    ):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(InputError, match=rf"damaged\.gguf: damaged.*{message}"):
            open_checkpoint(tmp_path / "damaged.gguf")


def change(**metadata):
    return {f"llama.{key.replace('__', '.')}": value for key, value in metadata.items()}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (change(block_count=65536), r"block_count: expected at most 3, .* got 65536: blk\.3\.\* is missing"),
        (change(block_count=(1 << 32) - 1), "block_count: expected at most 3"),
        (change(block_count=0), "block_count: expected a positive number, got 0"),
        (change(block_count="three"), "block_count: expected a positive number, got 'three'"),
        (change(block_count=[3]), "block_count: expected one value, got an array of 1"),
        (change(context_length=[256, 256, 256]), "context_length: expected one value, got an array of 3"),
        (change(rope__freq_base=[10000.0]), "freq_base: expected one value, got an array of 1"),
        (change(feed_forward_length=[80]), r"feed_forward_length: expected 3 counts, one a block, got '?\[80\]"),
        (change(feed_forward_length=[0, 0, 0]), "feed_forward_length: expected positive numbers, got"),
        (change(attention__head_count=0), "head_count: expected a positive number"),
        (change(attention__head_count=[9, 9, 3]), "head_count: blocks that differ are not supported"),
        (change(attention__head_count=12), r"attn_q.weight: expected shape \[192, 72\], got \[144, 72\]"),
        (change(attention__head_count_kv=2), "num_heads: expected a multiple of num_kv_heads 2, got 9"),
        (change(attention__key_length=15), "head_dim: expected an even number, got 15"),
        (change(rope__freq_base=1e30), "rope_theta: expected a number from 1"),
        (change(rope__freq_base=float("nan")), "freq_base: expected a positive number, got nan"),
        (change(rope__freq_base=10000), "freq_base: expected a number stored as a float, got the integer 10000"),
        (change(attention__layer_norm_rms_epsilon=float("inf")), "rms_norm_eps"),
        (change(context_length=(1 << 32) - 1), "max_position_embeddings: expected an integer from 1"),
        (change(logit_scale=0.5), "llama.logit_scale is not supported"),
        (change(feed_forward_length=1 << 30), r"blk\.0\.ffn_gate\.weight: expected shape \[1073741824, 72\]"),
    ],
)
def test_metadata_that_does_not_fit_is_one_line(metadata, message, tmp_path):
    path = write_gguf(pico.build_model("llama"), tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(InputError, match=rf"m\.gguf: .*{message}"):
        open_checkpoint(path)


def test_counts_of_one_a_block_are_read_where_they_are_equal(tmp_path):
    metadata = change(attention__head_count=[9, 9, 9], attention__head_count_kv=[3, 3, 3], feed_forward_length=[80] * 3)
    model = pico.build_model("llama")
    path = write_gguf(model, tmp_path / "m.gguf", metadata=metadata)
    assert open_checkpoint(path).spec == open_checkpoint(write_gguf(model, tmp_path / "n.gguf")).spec
