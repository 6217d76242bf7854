"""Hugging Face models: a folder with config.json and safetensors, single or sharded, or a hub id."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint.adapters import Adapter
from depthprune_runtime.checkpoint.assets import one_line, transformers_config, transformers_tokenizer
from depthprune_runtime.checkpoint.base import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from depthprune_runtime.checkpoint.container import DTYPE_NAMES, read_header
from depthprune_runtime.checkpoint.dense import DenseCheckpoint, StoredTensor, check_block_count, check_tensors
from depthprune_runtime.checkpoint.gate import parse_json, read_object, reading
from depthprune_runtime.checkpoint.mapped import MappedFile, WatchedFile
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families import FAMILIES, HF_NAMES, Names, decoder_spec

_log = logging.getLogger("depthprune_runtime")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DOWNLOAD = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_FLOATS = ("BF16", "F16", "F32", "F64")
_PREFIX = "model."
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


def download(repo_id: str) -> Path:
    """Folder of hub model `repo_id` in the local cache, downloaded if it is not there."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=_DOWNLOAD))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{repo_id}: no such file or folder, and not to be had from the hub: {reason}") from error


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose weights are codes that need scales. Raises InputError."""
    described = next((key for key in _QUANTIZATION_KEYS if config.get(key)), None)
    described = described or next((name for name in _QUANTIZATION_FILES if (folder / name).exists()), None)
    if described is not None:
        raise InputError(f"{folder}: quantized weights ({described}); expected a model in bf16, fp16 or fp32")


def tokenizer_assets(folder: Path) -> dict[str, bytes]:
    """Tokenizer files as Transformers saves them: `tokenizer.json`, its config, the chat template."""
    tokenizer = transformers_tokenizer(folder)
    wanted = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE)
    with tempfile.TemporaryDirectory() as saved:
        one = not isinstance(tokenizer.chat_template, dict)  # several go into the tokenizer's config
        tokenizer.save_pretrained(saved, save_jinja_files=one)
        return {n: (Path(saved) / n).read_bytes() for n in wanted if (Path(saved) / n).is_file()}


def _file_name(name: object) -> str:
    """A value of an index, which must name a file in the folder or below it."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not isinstance(name, str) or not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise InputError(f"weight_map: expected names of files in this folder, got {printable(repr(name))}")
    return name


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of every tensor in the safetensors files of `folder`; empty where it has none.

    Where there are both, the single file counts and not the index, as in Transformers. Raises InputError for an index
    that is not one, or that names files that are not there.
    """
    index, single = folder / _INDEX, folder / _SINGLE
    if single.is_file():
        if index.is_file():
            _log.warning("%s: has both %s and %s; the first is read, as in Transformers", folder, _SINGLE, _INDEX)
        with reading(single):
            return {n: single for n in read_header(single) if n != "__metadata__"}
    if not index.is_file():
        return {}
    with reading(index):
        content = parse_json(index.read_bytes(), str(index))
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        raise InputError(f"{index}: not a weight index: expected an object weight_map, got {type(listed).__name__}")
    with reading(index):
        files = {name: folder / name for name in dict.fromkeys(map(_file_name, listed.values()))}
        missing = sorted(name for name, path in files.items() if not path.is_file())
    if missing:
        raise InputError(f"{folder}: {len(missing)} shards are missing, {printable(missing[0])} first")
    return {name: files[file] for name, file in listed.items()}


class HuggingFaceCheckpoint(DenseCheckpoint):
    """A dense model of one of `families.FAMILIES`, packed tensor by tensor from mapped files.

    dtype: convert to this one; None keeps the dtype of the files.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, name: str | None = None) -> None:
        self.folder = self.where = folder
        self.source_files = (folder,)
        self.name = name or folder.name or str(folder)
        self._open: dict[Path, MappedFile] = {}
        self._adapter: Adapter | None = None
        stored = self._stored_config()
        self._files = weight_files(folder)
        if not self._files:
            raise InputError(f"{folder}: no weights; expected {_SINGLE} or {_INDEX}")
        self.watched = tuple(WatchedFile(file) for file in set(self._files.values()))
        self._stored = self._stored_tensors()
        if "num_hidden_layers" in stored:  # before a config of that size is built
            self._check_blocks(stored["num_hidden_layers"])
        config = self._full_config()
        self._check_blocks(config.get("num_hidden_layers"))
        table = self._table(FAMILIES[config["model_type"]].names if config["model_type"] in FAMILIES else HF_NAMES)
        self.dtype = dtype if dtype is not None else self._stored_dtype(table)
        with reading(folder / "config.json"):
            self._set_model(table, config)
        unused = table[_HEAD] if self.spec.tie_word_embeddings else ()
        check_tensors(folder, self._parts, self._stored, _FLOATS, unused)
        # what Transformers makes a generation config of where there is none
        self._special_ids = {n: config[n] for n in _SPECIAL_IDS if config.get(n) is not None}
        self.provenance = self._origin(config)

    def _set_model(self, table: dict[str, tuple[str, ...]], config: Mapping[str, Any]) -> None:
        """Spec and packed tensors of `config`; `table` may change with where the embedding is."""
        spec = decoder_spec({**config, "tie_word_embeddings": self._tied(config, table)})
        self._set_parts(table, spec, FAMILIES[config["model_type"]].folds(config))

    def _origin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model's provenance."""
        return {
            "source": self.name,
            "format": "huggingface",
            "family": config["model_type"],
            "blocks": config["num_hidden_layers"],
        }

    def _stored_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            raise InputError(f"{self.folder}: no config.json; expected the folder of a Hugging Face model")
        stored = read_object(path)
        model_type = stored.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise InputError(
                f"{path}: model_type: expected one of {sorted(FAMILIES)}, got {printable(repr(model_type))}"
            )
        refuse_quantized(self.folder, stored)
        return stored

    def _full_config(self) -> dict[str, Any]:
        try:
            return dict(transformers_config(self.folder).to_dict())  # fills every default
        except Exception as error:  # the config classes raise many types on bad values
            raise InputError(f"{self.folder / 'config.json'}: refused by Transformers: {one_line(error)}") from error

    def _check_blocks(self, claimed: object) -> None:
        check_block_count(claimed, self._stored, f"{self.folder / 'config.json'}: num_hidden_layers")

    def _stored_tensors(self) -> dict[str, StoredTensor]:
        headers = {}
        for path in sorted(set(self._files.values())):
            with reading(path):
                headers[path] = read_header(path)
        found = {}
        for name, path in self._files.items():
            if name == "__metadata__" or name not in headers[path]:
                raise InputError(f"{path}: tensor {printable(name)}, which the index places here, is missing")
            entry = headers[path][name]
            with reading(path):
                found[name] = StoredTensor(str(entry["dtype"]), tuple(entry["shape"]))
        return found

    def _table(self, names: Names) -> dict[str, tuple[str, ...]]:
        """`names` as these files have them: a base model saved alone has no prefix; embedding and head may be one
        tensor under either name."""
        table = dict(names)
        if not any(name.startswith(_PREFIX) for name in self._stored):
            table = {k: tuple(name.removeprefix(_PREFIX) for name in parts) for k, parts in table.items()}
        return table

    def _tied(self, config: Mapping[str, Any], table: dict[str, tuple[str, ...]]) -> bool:
        """Whether embedding and head are one, by Transformers' rule: not where the files hold two that differ."""
        embedding, head = table[_EMBEDDING][0], table[_HEAD][0]
        if not config.get("tie_word_embeddings"):
            if head not in self._stored and embedding in self._stored:
                raise InputError(
                    f"{self.folder}: tensor {head} is missing and tie_word_embeddings is false: a base model without "
                    "its output head; save the model with it (AutoModelForCausalLM)"
                )
            return False
        if head not in self._stored:
            return True
        if embedding not in self._stored:
            table[_EMBEDDING] = (head,)
            return True
        if self._stored[head] == self._stored[embedding] and torch.equal(self._read(head), self._read(embedding)):
            return True
        _log.warning(
            "%s: its config ties the output head to the embedding, but the files hold another head, which is used",
            self.folder,
        )
        return False

    def _stored_dtype(self, table: Mapping[str, tuple[str, ...]]) -> torch.dtype:
        by_name = {v: k for k, v in DTYPE_NAMES.items() if k.is_floating_point}
        names = [name for name in (table[_EMBEDDING][0], table[_HEAD][0]) if name in self._stored]
        stored = self._stored[names[0]].dtype if names else None
        if stored not in by_name:
            name = table[_EMBEDDING][0]
            raise InputError(f"{self.folder}: {name}: expected one of {sorted(by_name)}, got {printable(stored)}")
        return by_name[stored]

    def _read(self, source: str) -> Tensor:
        path = self._files[source]
        with reading(path):
            if path not in self._open:
                self._open[path] = MappedFile(path)
            stored = self._open[path].tensor(source)
        return stored if self._adapter is None else self._adapter.merged(source, stored)

    def adapt(self, adapter: Adapter) -> None:
        """Merge `adapter` into the weights as they are read. Raises InputError for one of another model."""
        shapes = {source: shape for parts in self._parts.values() for source, shape in parts.items()}
        adapter.match(shapes, self.spec.tie_word_embeddings)
        self._adapter = adapter
        self.source_files = (*self.source_files, adapter.folder)
        self.watched = (*self.watched, adapter.file)
        self.provenance = {
            **self.provenance,
            "adapters": [*self.provenance.get("adapters", ()), adapter.description()],
        }

    @functools.cached_property
    def _assets(self) -> dict[str, bytes]:
        assets: dict[str, bytes] = {}
        if any((self.folder / n).is_file() for n in _TOKENIZER_SOURCES):
            try:
                assets = tokenizer_assets(self.folder)
            except Exception as error:  # tokenizer classes raise many types on damaged files
                raise InputError(f"{self.folder}: its tokenizer cannot be loaded: {one_line(error)}") from error
        else:
            _log.warning("%s: no tokenizer (one of %s)", self.folder, ", ".join(_TOKENIZER_SOURCES))
        generation = self.folder / GENERATION_CONFIG_FILE
        if generation.is_file():
            with reading(generation):
                assets[GENERATION_CONFIG_FILE] = generation.read_bytes()
        elif self._special_ids:
            assets[GENERATION_CONFIG_FILE] = json.dumps(self._special_ids).encode()
        return assets

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._assets
