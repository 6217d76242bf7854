"""GGUF models in several files: read as one, whatever order the tensors have; parts that do not fit are refused."""

from __future__ import annotations

import gguf
import pico
import pytest
from gguf_files import add_metadata, write_gguf

from depthprune_runtime import InputError
from depthprune_runtime.checkpoint import open_checkpoint


def split(whole, folder, count, name="m", claimed=None):
    """What llama.cpp's gguf-split writes: the metadata in the first part, the tensors shared out."""
    reader = gguf.GGUFReader(whole)
    metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    per_part = -(-len(reader.tensors) // count)
    paths = []
    for number in range(count):
        path = folder / f"{name}-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (metadata if number == 0 else {}).items():
            add_metadata(writer, key, value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", claimed or len(reader.tensors))
        for tensor in reader.tensors[number * per_part : (number + 1) * per_part]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    return write_gguf(pico.build_model("llama"), tmp_path / "whole" / "m.gguf")


def test_all_parts_are_one_model(whole, tmp_path):
    first, *_ = split(whole, tmp_path, 3)
    ours, theirs = open_checkpoint(first), open_checkpoint(whole)
    assert ours.spec == theirs.spec
    assert ours.checksums() == theirs.checksums()


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit_are_one_line(whole, tmp_path):
    first, second, third = split(whole, tmp_path, 3)
    refused(second, r"part 2 of 3; give the first, m-00001-of-00003\.gguf")
    refused(first.rename(tmp_path / "renamed.gguf"), r"part 1 of 3 under another name; expected NAME-00001-of-00003")
    (tmp_path / "renamed.gguf").rename(first)
    kept = third.read_bytes()
    third.unlink()
    refused(first, r"m-00003-of-00003\.gguf is missing; a split model moves as a whole")
    third.write_bytes(second.read_bytes())
    refused(first, "expected part 3 of 3, got a part of another model")
    third.write_bytes(kept[: len(kept) // 2])
    refused(first, r"m-00003-of-00003\.gguf: truncated or damaged")
    first, *_ = split(whole, tmp_path, 3, name="n", claimed=7)
    refused(first, "expected 7 tensors in its 3 parts, got 30")


def test_parts_that_share_a_tensor_are_refused(whole, tmp_path):
    first, second = split(whole, tmp_path, 2)
    twice = split(whole, tmp_path, 1, name="o")[0]
    del second
    data = twice.read_bytes().replace(b"split.no\x02\0\0\0\0\0", b"split.no\x02\0\0\0\x01\0")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(
        data.replace(b"split.count\x02\0\0\0\x01\0", b"split.count\x02\0\0\0\x02\0")
    )
    refused(first, "is in another part, too")
