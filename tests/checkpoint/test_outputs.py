"""Nothing is lost: no job replaces a file that it reads, nor another one unless the caller says so."""

from __future__ import annotations

import os
import shutil

import pytest

from depthprune_runtime import FinerCutOptions, InputError, import_model, prune, quantize
from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.checkpoint.container import atomic_file
from depthprune_runtime.checkpoint.outputs import check_destination
from depthprune_runtime.cli import main

SMALL = {"samples": 4, "seq_len": 32}
JOBS = {
    "prune": lambda model, output, **options: prune(model, output, blocks=1, **SMALL, **options),
    "quantize": lambda model, output, **options: quantize(model, output, 8, **options),
    "import": import_model,
}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=JOBS)
def job(request, monkeypatch):
    """A job that must be refused before it scores or writes anything."""

    def refused(model, output, **options):
        with monkeypatch.context() as patch:
            patch.setattr("depthprune_runtime.pruning.prune.Calibrator", None)
            patch.setattr("depthprune_runtime.quantization.quantize.quantized_view", None)
            patch.setattr("depthprune_runtime.pruning.prune.write", None)
            with pytest.raises(InputError) as raised:
                JOBS[request.param](model, output, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return refused


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_the_source_is_never_replaced(pico_llama, pico_file, tmp_path, job, overwrite):
    folder, head, single = tmp_path / "hf", tmp_path / "cut" / "model.safetensors", tmp_path / "one.safetensors"
    shutil.copytree(pico_llama[1], folder)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "notes").write_text("mine")
    head.parent.mkdir()
    write_native(head, open_checkpoint(pico_file), max_shard_size=200_000)
    shutil.copy(pico_file, single)
    (tmp_path / "soft").symlink_to(single)
    os.link(single, tmp_path / "hard")
    (tmp_path / "way").symlink_to(folder)
    shard = next(p for p in head.parent.iterdir() if p != head)
    before = contents(tmp_path)
    for model, output in [
        (single, single),
        (single, tmp_path / "soft"),
        (tmp_path / "soft", single),
        (single, tmp_path / "hard"),
        (single, tmp_path / "hf" / ".." / "one.safetensors"),
        (head, head),
        (head, shard),
        (folder, folder / "model.safetensors"),
        (folder, folder / "config.json.safetensors" / ".." / "tokenizer.json"),
        (folder, tmp_path / "way" / "model.safetensors"),
        (tmp_path / "way", folder / "deeper" / "notes"),
    ]:
        message = job(model, output, overwrite=overwrite)
        assert "which this job reads" in message or "is a link" in message or "not .json" in message, (model, output)
        assert contents(tmp_path) == before


def test_a_new_file_never_hides_the_weights_of_a_source_folder(pico_llama, tmp_path, job):
    folder = tmp_path / "cut"
    pico_llama[0].save_pretrained(folder, max_shard_size="200KB")
    assert not (folder / "model.safetensors").exists()
    assert "which this job reads" in job(folder, folder / "model.safetensors")


def test_files_of_a_folder_that_are_links_are_safe_too(pico_llama, tmp_path, job):
    """As in the hub's cache: the folder holds links to files that lie elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    for file in pico_llama[1].iterdir():
        shutil.copy(file, tmp_path / "blobs" / f"blob-{file.name}")
        (tmp_path / "model" / file.name).symlink_to(tmp_path / "blobs" / f"blob-{file.name}")
    message = job(tmp_path / "model", tmp_path / "blobs" / "blob-model.safetensors", overwrite=True)
    assert "which this job reads" in message


@pytest.mark.parametrize("name", JOBS)
def test_an_existing_output_is_replaced_only_on_request(pico_file, tmp_path, name):
    output = tmp_path / "out"
    output.write_text("precious")
    with pytest.raises(InputError, match=r"is there already; .*--force \(overwrite=True\)"):
        JOBS[name](pico_file, output)
    assert output.read_text() == "precious"
    JOBS[name](pico_file, output, overwrite=True)
    assert open_checkpoint(output).spec.hidden_size == 72
    assert list(tmp_path.iterdir()) == [output]


def test_a_link_is_not_replaced(pico_file, tmp_path, job):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "file")
    assert "is a link to" in job(pico_file, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()


def test_names_of_other_formats_are_refused(pico_file, tmp_path, job):
    assert "not .gguf" in job(pico_file, tmp_path / "x.gguf")
    assert "not .BIN" in job(pico_file, tmp_path / "x.BIN")


def test_an_output_that_appears_meanwhile_stays(tmp_path, monkeypatch):
    for nameless in (True, False):
        if not nameless:
            monkeypatch.delattr(os, "O_TMPFILE")
        path = tmp_path / f"out-{nameless}"
        with pytest.raises(InputError, match="another process made it meanwhile"), atomic_file(path, False) as file:
            file.write(b"ours")
            path.write_bytes(b"theirs")
        assert path.read_bytes() == b"theirs"
        with atomic_file(path, overwrite=True) as file:
            file.write(b"ours")
        assert path.read_bytes() == b"ours"
    assert len(list(tmp_path.iterdir())) == 2


def test_where_hard_links_are_not_known_the_output_still_stays(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    with atomic_file(tmp_path / "new", overwrite=False) as file:
        file.write(b"ours")
    assert (tmp_path / "new").read_bytes() == b"ours"
    with pytest.raises(InputError, match="meanwhile"), atomic_file(tmp_path / "new", overwrite=False) as file:
        file.write(b"more")
    assert (tmp_path / "new").read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_the_state_of_a_search_has_a_file_of_its_own(pico_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    options = {"method": "finercut", "sublayers": 1, **SMALL, "calibration": str(text)}
    copy = shutil.copy(pico_file, tmp_path / "model")
    before = contents(tmp_path)
    for state in (copy, tmp_path / "out", tmp_path / "OUT", text):
        with pytest.raises(InputError, match="which this job reads"):
            prune(copy, tmp_path / "out", **options, options=FinerCutOptions(state_file=str(state)))
    with pytest.raises(InputError, match="which this job reads"):
        prune(copy, text, **options, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", [None, 5, b"out", "", ["out"]])
def test_outputs_that_are_no_paths(pico_file, job, output):
    assert "output: expected a path" in job(pico_file, output)


def test_names_that_no_disk_takes(tmp_path):
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(InputError, match=r"output .*: (cannot be written|.*not)"):
            check_destination(tmp_path / name)


def test_the_command_line_replaces_only_with_force(pico_file, tmp_path, capsys):
    model, picture = shutil.copy(pico_file, tmp_path / "model"), tmp_path / "map.png"
    (tmp_path / "out").write_text("precious")
    picture.write_text("precious")
    commands = [
        ["prune", model, "-o", tmp_path / "out", "--blocks", 1, "--samples", 4, "--seq-len", 32],
        ["quantize", model, "-o", tmp_path / "out"],
        ["import", model, "-o", tmp_path / "out"],
        ["inspect", model, "--plot", picture],
    ]
    for command in commands:
        assert main([str(a) for a in [*command, "-q"]]) == 1
        assert "--force" in capsys.readouterr().err
        assert {(tmp_path / "out").read_text(), picture.read_text()} == {"precious"}
    for command in commands:
        assert main([str(a) for a in [*command, "-q", "--force"]]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint(model).digest()
    assert main(["inspect", str(model), "--plot", str(model), "--force"]) == 1
