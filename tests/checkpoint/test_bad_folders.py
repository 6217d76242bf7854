"""Folders that are damaged or hostile: counts, configs, indexes, tokenizers, code; each ends in one line."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pico
import pytest

import depthprune_runtime
from depthprune_runtime import InputError
from depthprune_runtime.checkpoint import open_checkpoint

INDEX, SHARD = "model.safetensors.index.json", "part.safetensors"


@pytest.fixture
def folder(pico_llama, tmp_path):
    return shutil.copytree(pico_llama[1], tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_more_blocks_than_the_files_hold_are_refused_before_they_are_built(family, tmp_path):
    folder = pico.save(pico.build_model(family), tmp_path / "m", tokenizer=False)
    change_config(folder, num_hidden_layers=10**9)
    with pytest.raises(InputError, match=r"num_hidden_layers: expected at most 3, .* model\.layers\.3\.\* is missing"):
        open_checkpoint(folder)
    for bad in (0, -1, True, "3", None, 2.0):
        change_config(folder, num_hidden_layers=bad)
        with pytest.raises(InputError, match="num_hidden_layers: expected a positive integer"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads|refused by Transformers"),
        ({"head_dim": None, "num_attention_heads": 7}, "num_attention_heads|refused by Transformers"),
        ({"vocab_size": 1 << 62}, r"vocab_size: expected an integer from 1 to 2147483647"),
        ({"vocab_size": 400}, r"model\.embed_tokens\.weight: expected shape \[400, 72\], got \[384, 72\]"),
        (
            {"num_key_value_heads": 9},
            r"layers\.0\.self_attn\.k_proj\.weight: expected shape \[144, 72\], got \[48, 72\]",
        ),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings: expected an integer from 1 to"),
        ({"rope_parameters": {"rope_theta": 1e30, "rope_type": "default"}}, "rope_theta: expected a number"),
        ({"rope_parameters": {"rope_theta": "big", "rope_type": "default"}}, "rope_theta|refused by Transformers"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta|refused by Transformers"),
        ({"model_type": ["llama"]}, "model_type: expected one of"),
        ({"model_type": "\x1b[31mred"}, r"got '\\x1b\[31mred'"),
    ],
)
def test_configs_that_do_not_fit_are_one_line(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"3", b"\xff\xfe{}", b'{"a":' * 5000, b"[" * 100_000, b'{"a": NaN}', b'{"a": 1' + b"0" * 400 + b"}",
     b'{"a": 1, "a": 2}'],
)  # fmt: skip
def test_files_that_are_not_what_they_should_be_are_one_line(folder, file, content):
    (folder / "model.safetensors").rename(folder / SHARD)
    (folder / INDEX).write_text('{"weight_map": {}}')
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"model/{file}: ") as error:
        dict(open_checkpoint(folder).assets)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "not a weight index"),
        (3, "not a weight index"),
        ([], "not a weight index"),
        ({"a": "x" * 300}, "cannot be read: File name too long"),
        ({"a": "x\x1b[31m"}, r"1 shards are missing, x\\x1b\[31m first"),
        ({"__metadata__": SHARD}, "tensor __metadata__, which the index places here, is missing"),
        ({"lm_head.weights": SHARD}, r"tensor lm_head\.weights, which the index places here, is missing"),
    ],
)
def test_indexes_that_name_no_shard_are_one_line(folder, weight_map, message):
    (folder / "model.safetensors").rename(folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", [3, None, ["b"], {}, "", "/etc/passwd", "../x.safetensors", "b/../../x", "x\0y"])
def test_shards_lie_in_the_folder_of_their_index(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "x")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(InputError, match=r"index\.json: weight_map: expected names of files in this folder, got "):
        open_checkpoint(folder)


def bad_token_files():
    vocab = {"model": {"type": "BPE", "vocab": {"a": (1 << 31) - 1}, "merges": []}}
    yield json.dumps(vocab), r"token 'a': expected a token id from 0 to 9999999, got 2147483647"
    added = {"added_tokens": [{"id": 1 << 31, "content": "x"}], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    yield json.dumps(added), r"token 'x': expected a token id from 0 to 9999999, got 2147483648"
    yield "[" * 10_000 + "12345678", "at most 64 levels|not JSON"
    yield "\x1b[31m", "tokenizer cannot be loaded"


def test_a_bare_vocabulary_is_checked_too(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": (1 << 31) - 1}))
    with pytest.raises(InputError, match=r"vocab\.json: token 'a': expected a token id"):
        dict(open_checkpoint(folder).assets)


@pytest.mark.parametrize(("content", "message"), bad_token_files())
def test_bad_tokenizers_are_one_line(folder, content, message):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        dict(open_checkpoint(folder).assets)
    assert str(error.value).isprintable()


CODE = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Own: pass\n"


@pytest.mark.parametrize("with_tokenizer_json", [True, False])
def test_python_of_a_folder_never_runs(folder, tmp_path, with_tokenizer_json):
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"], "AutoModelForCausalLM": "own.Own"}
    change_config(folder, auto_map=auto)
    config = {"tokenizer_class": "Own", "auto_map": auto}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not with_tokenizer_json:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text('{"a": 0}')
    code = "import sys; from depthprune_runtime import checkpoint; dict(checkpoint.open_checkpoint(sys.argv[1]).assets)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Do you wish to run" not in done.stdout + done.stderr
    assert done.returncode == 0 or "InputError" in done.stderr.strip().splitlines()[-1], done.stderr
    assert not mark.exists()


def test_nothing_is_loaded_through_transformers_without_refusing_code():
    package = Path(depthprune_runtime.__file__).parent
    calls = [
        (path.name, node)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    assert calls
    for name, call in calls:
        options = {k.arg: k.value for k in call.keywords}
        trusted = options.get("trust_remote_code")
        assert isinstance(trusted, ast.Constant), name
        assert trusted.value is False, name
