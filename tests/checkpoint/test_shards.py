"""Checkpoints in several files: the same model, nothing half-written, damage and absence noticed."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.checkpoint import NativeCheckpoint, open_checkpoint, write_native
from depthprune_runtime.checkpoint.container import TensorEntry, read_header
from depthprune_runtime.checkpoint.shards import parse_size, remove_stale, split

LIMIT = 200_000  # bytes; the pico model takes some 900,000


@pytest.fixture
def sharded(pico_file, tmp_path):
    path = tmp_path / "model.safetensors"
    write_native(path, open_checkpoint(pico_file), max_shard_size=LIMIT)
    return path


def shards(path):
    return sorted(p for p in path.parent.iterdir() if p != path)


def test_the_same_model_comes_back(pico_file, pico_runtime, sharded):
    one, many = open_checkpoint(pico_file), open_checkpoint(sharded)
    assert len(shards(sharded)) > 2
    assert (many.spec, many.plan, many.assets) == (one.spec, one.plan, one.assets)
    assert many.digest() == one.digest()
    assert all(torch.equal(many.tensor(n), one.tensor(n)) for n in one.spec.tensor_shapes())
    out = Runtime.load(sharded, device="cpu").generate("the quick", max_new_tokens=8)
    assert str(out) == str(pico_runtime.generate("the quick", max_new_tokens=8))


def test_written_as_one_file_again_it_is_the_old_file(pico_file, sharded):
    again = sharded.with_name("again.safetensors")
    write_native(again, open_checkpoint(sharded))
    assert again.read_bytes() == pico_file.read_bytes()
    again.unlink()
    write_native(sharded, open_checkpoint(pico_file), overwrite=True)
    assert sharded.read_bytes() == pico_file.read_bytes()
    assert shards(sharded) == []  # those of the checkpoint that it replaced


def test_shards_keep_to_the_size_and_hold_every_weight_once(pico_file, sharded):
    spec = open_checkpoint(pico_file).spec
    found = []
    for file in shards(sharded):
        header = read_header(file)
        weights = [n for n in header if n not in ("__metadata__", "model.norm.weight")]
        size = sum(header[n]["data_offsets"][1] - header[n]["data_offsets"][0] for n in weights)
        assert size <= LIMIT or len(weights) == 1
        found += weights
    assert sorted(found) == sorted(spec.tensor_shapes())
    content = json.loads(read_header(sharded)["__metadata__"]["depthprune"])
    assert set(content["weight_map"]) == set(found)
    assert set(content["weight_map"].values()) == {f.name for f in shards(sharded)}


def test_it_moves_and_its_head_may_be_renamed(sharded, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in shards(sharded):
        shutil.move(file, moved)
    sharded.rename(moved / "renamed.safetensors")
    assert open_checkpoint(moved / "renamed.safetensors").spec.hidden_size == 72
    remove_stale(sharded)  # of the old name, which is not there any more
    remove_stale(moved / "model.safetensors")  # its shards serve the renamed head
    open_checkpoint(moved / "renamed.safetensors")


def test_a_missing_shard_is_refused_in_one_line(sharded):
    shards(sharded)[1].unlink()
    with pytest.raises(InputError, match=r"1 of its \d+ shards are missing in its folder, model-00002-of-") as raised:
        open_checkpoint(sharded)
    assert "\n" not in str(raised.value)


def test_every_kind_of_damage_to_a_shard_is_noticed(sharded):
    victim = shards(sharded)[1]
    good = victim.read_bytes()
    length = int.from_bytes(good[:8], "little")
    for at in (0, 9, length, 8 + length, (8 + length + len(good)) // 2, len(good) - 1):
        data = bytearray(good)
        data[at] ^= 4
        victim.write_bytes(data)
        with pytest.raises(InputError, match=r"-00002-of-.*(damaged|truncated)"):
            open_checkpoint(sharded)
    victim.write_bytes(good[:-1])
    with pytest.raises(InputError, match="truncated"):
        open_checkpoint(sharded, verify=False)
    victim.write_bytes(good)
    open_checkpoint(sharded)


def test_a_shard_of_another_model_of_the_same_shapes_is_refused_without_reading_it(sharded, tmp_path):
    class Other(NativeCheckpoint):
        def tensor(self, name):
            return super().tensor(name) + 1 if name.startswith("sublayers") else super().tensor(name)

        def stored_checksum(self, entry):
            return None

    other = tmp_path / "other.safetensors"
    mine = shards(sharded)
    write_native(other, Other(sharded), max_shard_size=LIMIT)
    theirs = [p for p in shards(other) if p.name.startswith("other-00002")]
    shutil.copy(theirs[0], mine[1])
    with pytest.raises(InputError, match="a shard of another checkpoint"):
        open_checkpoint(sharded, verify=False)


def test_a_shard_alone_is_refused_with_advice(sharded):
    with pytest.raises(InputError, match="give its head"):
        open_checkpoint(shards(sharded)[0])


def test_transformers_refuses_head_and_shards(sharded, pico_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    for file in (sharded, shards(sharded)[0]):
        folder = tmp_path / f"hf {file.name}"
        folder.mkdir()
        shutil.copy(pico_llama[1] / "config.json", folder)
        shutil.copy(file, folder / "model.safetensors")
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(folder)


_KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from depthprune_runtime.checkpoint import container, open_checkpoint, write_native
source, path, moment = sys.argv[1:]
left = int(moment)
def publish(self, target, overwrite=True, plain=container.PendingFile.publish):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    plain(self, target, overwrite)
def written(name):
    if moment == "-1" and name == "sublayers.3.norm.weight":
        os.kill(os.getpid(), signal.SIGKILL)
container.PendingFile.publish = publish
class Scaled:
    def __init__(self, plain): self.plain = plain
    def __getattr__(self, name): return getattr(self.plain, name)
    def tensor(self, name): return self.plain.tensor(name) * 2
    def stored_checksum(self, entry): return None
write_native(Path(path), Scaled(open_checkpoint(source)), written, 200_000, overwrite=True)
"""


@pytest.mark.parametrize("old", [False, True])
def test_killed_at_any_moment_it_leaves_the_old_checkpoint_or_nothing(pico_file, tmp_path, old):
    """-1: in the middle of the second shard; n: before file n + 1 takes its name; the head is the last one."""
    path = tmp_path / "model.safetensors"
    if old:
        write_native(path, open_checkpoint(pico_file), max_shard_size=LIMIT)
    files = set(tmp_path.iterdir())
    count = len(split_count(pico_file))
    for moment in (-1, 0, 1, count):
        command = [sys.executable, "-c", _KILLED_WRITE, str(pico_file), str(path), str(moment)]
        assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
        if old:
            assert open_checkpoint(path).digest() == open_checkpoint(pico_file).digest()
        else:
            assert not path.exists()
        if moment < 1:
            assert {p for p in tmp_path.iterdir() if not p.name.startswith(".")} == files
    # clears the shards that were left
    write_native(path, open_checkpoint(pico_file), max_shard_size=LIMIT, overwrite=True)
    assert len(list(tmp_path.iterdir())) == count + 1
    assert open_checkpoint(path).digest() == open_checkpoint(pico_file).digest()


def split_count(file):
    checkpoint = open_checkpoint(file)
    shapes = checkpoint.spec.tensor_shapes()
    return split([TensorEntry(n, checkpoint.dtype, s) for n, s in shapes.items()], LIMIT)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), limit=st.integers(1, 80))
def test_split_keeps_order_and_size(sizes, limit):
    entries = [TensorEntry(str(i), torch.uint8, (n,)) for i, n in enumerate(sizes)]
    groups = split(entries, limit)
    assert [e for g in groups for e in g] == entries
    assert all(g and (len(g) == 1 or sum(e.nbytes for e in g) <= limit) for g in groups)
    for a, b in itertools.pairwise(groups):
        assert sum(e.nbytes for e in a) + b[0].nbytes > limit


@pytest.mark.parametrize(
    ("given", "nbytes"), [("5GB", 5 * 10**9), ("1.5 gib", 3 << 29), ("200", 200), (7, 7), ("10MB", 10**7)]
)
def test_sizes(given, nbytes):
    assert parse_size(given) == nbytes


@pytest.mark.parametrize("given", ["", "GB", "5 parsecs", 0, -1, 1.5, True, None, "0.1", "-5GB", "9" * 400 + "GB"])
def test_impossible_sizes_are_refused(given):
    with pytest.raises(InputError, match="max_shard_size"):
        parse_size(given)


def test_too_many_shards_are_refused_before_any_file(pico_file, tmp_path):
    entries = [TensorEntry(str(i), torch.uint8, (2,)) for i in range(501)]
    with pytest.raises(InputError, match="501 shards"):
        split(entries, 2)
