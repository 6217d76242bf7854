"""Our file: what is written can be read, by others too; every kind of damage is noticed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.checkpoint import NativeCheckpoint, open_checkpoint, write_native
from depthprune_runtime.checkpoint.container import atomic_file
from depthprune_runtime.checkpoint.outputs import check_destination


def copy_with(source: Path, target: Path, change) -> Path:
    data = bytearray(source.read_bytes())
    changed = change(data)
    target.write_bytes(changed if changed is not None else data)
    return target


def test_the_safetensors_library_reads_it(pico_file, pico_llama):
    with safe_open(pico_file, "pt") as file:
        weight = file.get_tensor("sublayers.1.down_proj.weight")
        assert file.metadata()["format"] == "depthprune"
    assert torch.equal(weight, pico_llama[0].model.layers[0].mlp.down_proj.weight)


def test_transformers_refuses_it_rather_than_misread_it(pico_file, pico_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copy(pico_llama[1] / "config.json", tmp_path)
    shutil.copy(pico_file, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_stock_safetensors_file_is_refused_with_advice(pico_llama):
    with pytest.raises(InputError, match="give its folder"):
        open_checkpoint(pico_llama[1] / "model.safetensors")


def test_writing_is_deterministic(pico_llama, pico_file, tmp_path):
    write_native(tmp_path / "again.safetensors", open_checkpoint(pico_llama[1]))
    assert (tmp_path / "again.safetensors").read_bytes() == pico_file.read_bytes()


def test_the_digest_is_the_same_in_every_format(pico_llama, pico_file):
    assert open_checkpoint(pico_llama[1]).digest() == open_checkpoint(pico_file).digest()
    assert open_checkpoint(pico_llama[1], torch.bfloat16).digest() != open_checkpoint(pico_file).digest()


def test_weights_are_aligned_and_mapped_without_a_copy(pico_file):
    checkpoint = NativeCheckpoint(pico_file)
    runtime = Runtime(checkpoint, torch.device("cpu"), checkpoint.dtype, mmap=True)
    mapped = checkpoint.tensor("norm.weight")
    assert checkpoint.tensor("embed_tokens.weight").data_ptr() % 64 == 0
    assert runtime.decoder.norm.data_ptr() == mapped.data_ptr()


def test_only_the_file_that_is_asked_for_is_read(pico_file, pico_llama, monkeypatch):
    read = []
    asset = NativeCheckpoint._asset
    monkeypatch.setattr(NativeCheckpoint, "_asset", lambda self, name: read.append(name) or asset(self, name))
    assets = open_checkpoint(pico_file).assets
    assert "tokenizer.json" in assets and "nothing.json" not in assets and not read
    assert assets["tokenizer_config.json"] == open_checkpoint(pico_llama[1]).assets["tokenizer_config.json"]
    assert read == ["assets.tokenizer_config.json"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(pico_file, tmp_path, where, bit):
    size = pico_file.stat().st_size
    at = int(where * size)

    def flip(data):
        data[at] ^= 1 << bit

    with pytest.raises(InputError, match=r"damaged|truncated|not a|expected"):
        open_checkpoint(copy_with(pico_file, tmp_path / "flipped.safetensors", flip))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 8000), bit=st.integers(0, 7))
def test_every_flipped_bit_in_the_header_is_noticed(pico_file, tmp_path, at, bit):
    test_every_flipped_bit_is_noticed.hypothesis.inner_test(
        pico_file, tmp_path, (at + 0.5) / pico_file.stat().st_size, bit
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_noticed(pico_file, tmp_path, keep):
    def cut(data):
        return data[: int(keep * len(data))]

    with pytest.raises(InputError, match=r"truncated"):
        open_checkpoint(copy_with(pico_file, tmp_path / "cut.safetensors", cut))


def edited_header(source: Path, target: Path, edit) -> Path:
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return target


def set_shape(header):
    header["norm.weight"]["shape"] = [73]


def set_dtype(header):
    header["norm.weight"]["dtype"] = "I32"


def set_offsets(header):
    header["norm.weight"]["data_offsets"] = [0, 8]


def beyond_the_end(header):
    start, _ = header["norm.weight"]["data_offsets"]
    header["norm.weight"]["shape"] = [10**9]
    header["norm.weight"]["data_offsets"] = [start, start + 4 * 10**9]


def drop_tensor(header):
    del header["norm.weight"]


def swap_two(header):
    a, b = header["sublayers.0.norm.weight"], header["norm.weight"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def not_an_object(header):
    header["norm.weight"] = 7


def other_spec(header):
    metadata = header["__metadata__"]
    metadata["depthprune"] = metadata["depthprune"].replace('"hidden_size":72', '"hidden_size":73')


@pytest.mark.parametrize(
    "edit",
    [set_shape, set_dtype, set_offsets, beyond_the_end, drop_tensor, swap_two, not_an_object, other_spec],
    ids=lambda f: f.__name__,
)
def test_a_header_that_lies_is_refused(pico_file, tmp_path, edit):
    with pytest.raises(InputError, match=r"damaged|truncated"):
        open_checkpoint(edited_header(pico_file, tmp_path / "lie.safetensors", edit))


def rewrite_description(header, **changes):
    import xxhash

    metadata = header["__metadata__"]
    text = json.dumps(json.loads(metadata["depthprune"]) | changes)
    metadata |= {"depthprune": text, "checksum": xxhash.xxh3_128(text.encode()).hexdigest()}


def test_other_versions_and_unknown_keys_are_refused(pico_file, tmp_path):
    newer = edited_header(pico_file, tmp_path / "v2", lambda h: rewrite_description(h, format_version=2))
    with pytest.raises(InputError, match="expected format version 1, got 2"):
        open_checkpoint(newer)
    unknown = edited_header(pico_file, tmp_path / "key", lambda h: rewrite_description(h, colour="red"))
    with pytest.raises(InputError, match="colour"):
        open_checkpoint(unknown)


def test_moved_alone_it_loads_and_generates(pico_file, pico_runtime, tmp_path):
    (tmp_path / "empty").mkdir()
    moved = shutil.copy(pico_file, tmp_path / "empty" / "renamed.safetensors")
    out = Runtime.load(moved, device="cpu").generate("the quick", max_new_tokens=8)
    assert str(out) == str(pico_runtime.generate("the quick", max_new_tokens=8))


def test_a_failing_body_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(target) as file:
        file.write(b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_named_temporary_files_serve_where_nameless_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    test_a_failing_body_leaves_the_old_file(tmp_path)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fills_up_while_writing(pico_llama, tmp_path):
    """The process's file size limit stands for the disk; the write itself fails, in the middle."""
    code = (
        "import resource, sys; from depthprune_runtime.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"sys.exit(main(['import', {str(pico_llama[1])!r}, '-o', {str(tmp_path / 'out')!r}, '-q']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "free some space" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_full_disk_is_refused_before_the_work(pico_llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes, its disk has 1,000 free"):
        write_native(tmp_path / "out", open_checkpoint(pico_llama[1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/proc/out.safetensors", "not writable|cannot be written"),
        ("/nowhere/out.safetensors", "does not exist"),
        ("/dev/null", "regular file"),
        ("/", "regular file"),
    ],
)
def test_impossible_outputs_are_refused(path, message):
    with pytest.raises(InputError, match=message):
        check_destination(Path(path), overwrite=True)
        with atomic_file(Path(path)):
            pass


def test_killed_in_the_middle_it_leaves_nothing(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from depthprune_runtime.checkpoint.container import atomic_file\n"
        f"with atomic_file(Path({str(tmp_path / 'out')!r})) as f:\n"
        "    f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
