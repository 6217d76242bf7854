"""A source that another process writes to: noticed before its bytes are used, and nothing is published."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from gguf_files import write_gguf

from depthprune_runtime import InputError, prune, quantize
from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.plan import Drop, Flatten, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

LAST = "lm_head.weight"  # of the file, too


@pytest.fixture
def source(pico_file, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return shutil.copy(pico_file, tmp_path / "in" / "model.safetensors")


def flip(path, at, keep_time=False):
    """Change one byte in place."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 64]))
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def middle_of(path, name):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length + sum(json.loads(data[8 : 8 + length])[name]["data_offsets"]) // 2


def test_a_file_that_shrank_is_refused_rather_than_read(source):
    """In a process of its own: a lost page would end it with SIGBUS."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from depthprune_runtime.checkpoint import open_checkpoint, write_native\n"
        "from depthprune_runtime import InputError\n"
        f"path = Path({str(source)!r}); checkpoint = open_checkpoint(path); os.truncate(path, 20_000)\n"
        "for use in (lambda: checkpoint.tensor('lm_head.weight').sum(), checkpoint.verify,\n"
        "            lambda: dict(checkpoint.assets),\n"
        f"            lambda: write_native(Path({str(source.parent.parent / 'out' / 'x')!r}), checkpoint)):\n"
        "    try: use()\n"
        "    except InputError as error: assert 'wrote to it since it was opened' in str(error), error\n"
        "    else: sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != -signal.SIGBUS
    assert (done.returncode, done.stderr) == (0, "")
    assert list((source.parent.parent / "out").iterdir()) == []


def views(dense):
    """Whatever copies tensors of `dense` and is written."""
    yield dense
    yield PrunedCheckpoint(dense, PrunePlan("test", "", (Drop(2), Drop(9))))
    yield PrunedCheckpoint(dense, PrunePlan("test", "", (Flatten((1, 2)),)))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("keep_time", [False, True])
def test_bytes_that_changed_after_the_check_are_not_written_on(source, tmp_path, which, keep_time):
    """Also where the clock does not tell: copied tensors must have the source's checksum."""
    view = list(views(open_checkpoint(source)))[which]
    flip(source, middle_of(source, LAST), keep_time)
    message = "has checksum" if keep_time else "since it was opened"
    with pytest.raises(InputError, match=message) as raised:
        write_native(tmp_path / "out" / "x", view)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_source_that_changes_during_the_writing_publishes_nothing(source, tmp_path):
    """A merged tensor has no checksum to be compared with; the last look at the source tells."""
    view = PrunedCheckpoint(open_checkpoint(source), PrunePlan("test", "", (Flatten((1, 2)),)))

    def on_tensor(name):
        if name.startswith("assets.tokenizer.json"):
            flip(source, 9000)

    with pytest.raises(InputError, match="since it was opened"):
        write_native(tmp_path / "out" / "x", view, on_tensor)
    assert list((tmp_path / "out").iterdir()) == []


def test_quantised_weights_are_compared_too(source, tmp_path):
    quantize(source, tmp_path / "in" / "q", 8, group_size=32)
    quantized = open_checkpoint(tmp_path / "in" / "q")
    pruned = PrunedCheckpoint(quantized, PrunePlan("test", "", (Drop(2),)))
    name = "sublayers.3.down_proj.weight.codes"
    assert pruned.stored_checksum("sublayers.2.down_proj.weight.codes") == quantized.stored_checksum(name)
    assert quantized.stored_checksum(name) is not None
    flip(tmp_path / "in" / "q", middle_of(tmp_path / "in" / "q", name), keep_time=True)
    with pytest.raises(InputError, match="has checksum"):
        write_native(tmp_path / "out" / "x", pruned)


def test_a_file_that_is_replaced_as_a_whole_does_no_harm(source, pico_file, tmp_path):
    dense = open_checkpoint(source)
    other = tmp_path / "in" / "other"
    prune(pico_file, other, blocks=1, repair="none", samples=4, seq_len=32)
    other.replace(source)
    write_native(tmp_path / "out" / "x", dense)
    assert (tmp_path / "out" / "x").read_bytes() == pico_file.read_bytes()


@pytest.mark.parametrize("kind", ["huggingface", "gguf"])
def test_other_sources_are_watched_too(pico_llama, tmp_path, kind):
    """In a process of its own, as above."""
    (tmp_path / "out").mkdir()
    if kind == "gguf":
        model = file = tmp_path / "model.gguf"
        write_gguf(pico_llama[0], file)
    else:
        model = shutil.copytree(pico_llama[1], tmp_path / "model")
        file = model / "model.safetensors"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from depthprune_runtime.checkpoint import open_checkpoint, write_native\n"
        "from depthprune_runtime import InputError\n"
        f"checkpoint = open_checkpoint({str(model)!r}); checkpoint.tensor('norm.weight').sum()\n"
        "dict(checkpoint.assets)\n"
        f"os.truncate({str(file)!r}, 20_000)\n"
        "for use in (lambda: checkpoint.tensor('sublayers.10.o_proj.weight').sum(), checkpoint.check_unchanged,\n"
        f"            lambda: write_native(Path({str(tmp_path / 'out' / 'x')!r}), checkpoint)):\n"
        "    try: use()\n"
        "    except InputError as error: assert 'wrote to it since it was opened' in str(error), error\n"
        "    else: sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != -signal.SIGBUS
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
