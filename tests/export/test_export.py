"""`export_model` and `depthprune export`: outputs, refusals, checks, cards and uploads."""

from __future__ import annotations

import dataclasses
import json

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from depthprune_runtime import InputError, export_model, quantize
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.cli import main
from depthprune_runtime.export import push as pushing
from depthprune_runtime.export.rope import divisors, recognized
from depthprune_runtime.export.targets import fitting
from depthprune_runtime.inspection.describe import inspect, render
from depthprune_runtime.spec import FFNSpec, RopeSpec


def test_command_line(pruned, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(pruned("wide")), "--to", "hf", "-o", str(out), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(out) and found["kind"] == "depthprune" and found["distance"] < 1e-6
    command = ["export", str(pruned("wide")), "--to", "gguf", "-o", str(tmp_path / "out.gguf"), "-q", "--no-check"]
    assert main([*command, "--dtype", "fp16"]) == 0
    assert "gguf, deci; not checked" in capsys.readouterr().out
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_a_folder_is_replaced_only_by_force(pruned, tmp_path):
    out = tmp_path / "out"
    export_model(pruned("wide"), out, "hf", check=False)
    with pytest.raises(InputError, match="--force"):
        export_model(pruned("uniform"), out, "hf", check=False)
    assert json.loads((out / "config.json").read_text())["model_type"] == "depthprune"
    export_model(pruned("uniform"), out, "hf", check=False, overwrite=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert not list(out.glob("*.py"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folders_that_are_never_replaced(pruned, tmp_path, monkeypatch):
    own = pico.save(pico.build_model("llama"), tmp_path / "model")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in own.iterdir())
    with pytest.raises(InputError, match="holds what this job reads"):
        export_model(own, own, "hf", overwrite=True)
    with pytest.raises(InputError, match="reads"):
        export_model(own, own / "model.safetensors", "gguf", overwrite=True)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in own.iterdir()) == before
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="not of a model"):
        export_model(pruned("wide"), papers, "hf", overwrite=True)
    with pytest.raises(InputError, match="got a file"):
        export_model(pruned("wide"), papers / "note.txt", "hf", overwrite=True)
    with pytest.raises(InputError, match="got something else"):
        export_model(pruned("wide"), papers, "gguf", overwrite=True)
    monkeypatch.chdir(papers)
    for here in (".", "..", "/"):
        with pytest.raises(InputError):
            export_model(pruned("wide"), here, "hf", overwrite=True)
    with pytest.raises(InputError, match="create it first"):
        export_model(pruned("wide"), tmp_path / "no" / "out", "hf")
    assert (papers / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["hf", "gguf", "deci"])
def test_nothing_is_left_of_what_is_wrong(pruned, tmp_path, monkeypatch, target):
    """A wrong weight is found by the check, whatever wrote it."""
    from depthprune_runtime.export.parts import Unpacked

    good = Unpacked.tensor

    def swapped(self, name):
        tensor = good(self, name)
        return tensor.flip(0).contiguous() if "down" in name and ".3." in name else tensor

    monkeypatch.setattr(Unpacked, "tensor", swapped)
    with pytest.raises(InputError, match=r"out: its logits are .* \(relative L2\)"):
        export_model(pruned("uniform"), tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_a_replaced_folder_survives_a_failure(pruned, tmp_path, monkeypatch):
    from depthprune_runtime.export import folder

    out = tmp_path / "out"
    export_model(pruned("wide"), out, "hf", check=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_config", fails)
    with pytest.raises(InputError, match="free some space"):
        export_model(pruned("uniform"), out, "hf", check=False, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_quantized_files_ask_for_dequantize(pruned, tmp_path):
    quantize(pruned("wide"), tmp_path / "q8.safetensors", 8, method="rtn")
    with pytest.raises(InputError, match="--dequantize"):
        export_model(tmp_path / "q8.safetensors", tmp_path / "out", "hf")
    result = export_model(tmp_path / "q8.safetensors", tmp_path / "out", "hf", dequantize=True)
    assert result.distance is not None and result.distance < 1e-6
    found, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "q8.safetensors")
    assert torch.equal(found.tensor("sublayers.0.qkv_proj.weight"), source.tensor("sublayers.0.qkv_proj.weight"))


def test_values_that_overflow(tmp_path):
    folder = pico.save(pico.build_model("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="overflow float16"):
        export_model(folder, tmp_path / "out", "hf", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_a_model_without_attention_has_no_target(pruned):
    spec = open_checkpoint(pruned("uniform")).spec
    ffns = dataclasses.replace(spec, sublayers=(FFNSpec(8, (0,)),))
    assert all(reason is not None and "no other target" in reason for reason in fitting(ffns).values())


def test_card(pruned, tmp_path):
    export_model(
        pruned("wide"), tmp_path / "out", "hf", check=False, license="apache-2.0", perplexity="12.3 on wikitext2"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and 'license: "apache-2.0"' in card
    for part in ("Method: finercut", "1 flatten, 1 drop", "12.3 on wikitext2", "trust_remote_code=True"):
        assert part in card
    export_model(pruned("uniform"), tmp_path / "stock", "hf", check=False)
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "trust_remote_code" not in card and "License: that of the parent model" in card


class Hub:
    """What `HfApi` is asked for."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("folder", repo_id, sorted(p.name for p in folder_path.iterdir())))

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
        self.calls.append(("file", repo_id, path_in_repo, path_or_fileobj.stat().st_size > 0))


def test_push(pruned, tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    result = export_model(pruned("wide"), tmp_path / "out", "hf", check=False, push_to="me/model", private=True)
    assert result.url == "https://hub/me/model"
    assert hub.calls[0] == ("create", "me/model", True, True)
    assert hub.calls[1][:2] == ("folder", "me/model")
    assert {"config.json", "model.safetensors", "modeling_depthprune.py", "README.md"} <= set(hub.calls[1][2])
    export_model(pruned("wide"), tmp_path / "out.gguf", "gguf", check=False, push_to="me/model")
    assert hub.calls[-1] == ("file", "me/model", "out.gguf", True)


def test_push_that_fails(tmp_path):
    class Down(Hub):
        def upload_folder(self, repo_id, folder_path):
            raise OSError("the hub is away")

    with pytest.raises(InputError, match=r"the hub is away; what was written is in"):
        pushing.push(tmp_path, "me/model", client=Down())
    with pytest.raises(InputError, match="OWNER/NAME"):
        pushing.check_repository("model")


def test_divisors_of_a_known_llama_are_recognized(pruned):
    spec = open_checkpoint(pruned("uniform")).spec
    rule = RopeSpec(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    stored = [float(x) for x in torch.tensor(divisors(rule, 16), dtype=torch.float32)]
    factors = RopeSpec(500000.0, "factors", factors=tuple(stored))
    assert recognized(dataclasses.replace(spec, rope=factors)) == rule
    other = dataclasses.replace(factors, factors=tuple(f * 1.01 for f in stored))
    assert recognized(dataclasses.replace(spec, rope=other)) == other


def test_inspect_says_what_fits(pruned):
    description = inspect(open_checkpoint(pruned("widths")))
    assert description["exports"]["hf"] is None and description["exports"]["gguf"] is None
    assert "one number of query heads" in description["exports"]["deci"]
    assert description["tensor_parallel_sizes"] == [1]
    text = render(description)
    assert "exports     hf, gguf\n" in text and "not deci: " in text
    assert "2 stages: VLLM_PP_LAYER_PARTITION=" in text
