"""Hugging Face models: a folder with config.json and safetensors, single or sharded, or a hub id."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthprune_runtime.checkpoint.base import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Checkpoint,
)
from depthprune_runtime.checkpoint.container import DTYPE_NAMES, read_header
from depthprune_runtime.errors import InputError
from depthprune_runtime.families import FAMILIES, HF_NAMES, decoder_spec, source_names

_log = logging.getLogger("depthprune_runtime")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DOWNLOAD = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]
_TOKENIZER_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def download(repo_id: str) -> Path:
    """Folder of hub model `repo_id` in the local cache, downloaded if it is not there."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=_DOWNLOAD))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{repo_id}: no such file or folder, and not to be had from the hub: {reason}") from error


def tokenizer_assets(source: Path, **options: Any) -> dict[str, bytes]:
    """Tokenizer files as Transformers saves them: `tokenizer.json`, its config, the chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    wanted = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {n: (Path(folder) / n).read_bytes() for n in wanted if (Path(folder) / n).is_file()}


class HuggingFaceCheckpoint(Checkpoint):
    """A dense model of one of `families.FAMILIES`, packed tensor by tensor from mapped files.

    dtype: convert to this one; None keeps the dtype of the files.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, name: str | None = None) -> None:
        self.folder = folder
        self.source_files = (folder,)
        self.name = name or folder.name or str(folder)
        config = self._config()
        try:
            self.spec = decoder_spec(config)
        except KeyError as error:
            raise InputError(f"{folder}: config.json has no key {error}") from error
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error
        self._files = self._weight_map()
        self._open: dict[str, Any] = {}
        self.dtype = dtype if dtype is not None else self._stored_dtype()
        self.provenance = {
            "source": self.name,
            "format": "huggingface",
            "family": config["model_type"],
            "blocks": config["num_hidden_layers"],
        }

    def _config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            raise InputError(f"{self.folder}: no config.json; expected the folder of a Hugging Face model")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        model_type = stored.get("model_type") if isinstance(stored, dict) else None
        if model_type not in FAMILIES:
            raise InputError(f"{path}: model_type: expected one of {sorted(FAMILIES)}, got {model_type!r}")
        if stored.get("quantization_config"):
            raise InputError(f"{path}: quantized weights; expected a model in bf16, fp16 or fp32")
        from transformers import AutoConfig

        try:
            return dict(AutoConfig.from_pretrained(self.folder).to_dict())  # fills every default
        except Exception as error:  # the config classes raise many types on bad values
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: refused by Transformers: {reason}") from error

    def _weight_map(self) -> dict[str, Path]:
        """Tensor name -> file."""
        single, index = self.folder / _SINGLE, self.folder / _INDEX
        if index.is_file():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index}: not a weight index: {error}") from error
            files = {name: self.folder / file for name, file in listed.items()}
            missing = sorted({f.name for f in files.values() if not f.is_file()})
            if missing:
                raise InputError(f"{self.folder}: shards are missing: {missing}")
            return files
        if single.is_file():
            return {name: single for name in read_header(single) if name != "__metadata__"}
        raise InputError(f"{self.folder}: no weights; expected {_SINGLE} or {_INDEX}")

    @functools.cached_property
    def _headers(self) -> dict[Path, dict[str, Any]]:
        return {path: read_header(path) for path in set(self._files.values())}

    def _stored_dtype(self) -> torch.dtype:
        name = source_names(HF_NAMES, self.spec, "embed_tokens.weight")[0]
        file = self._files.get(name)
        stored = self._headers[file].get(name, {}).get("dtype") if file is not None else None
        by_name = {v: k for k, v in DTYPE_NAMES.items() if k.is_floating_point}
        if stored not in by_name:
            raise InputError(f"{self.folder}: {name}: expected one of {sorted(by_name)}, got {stored}")
        return by_name[stored]

    def _read(self, name: str) -> Tensor:
        path = self._files.get(name)
        if path is None:
            raise InputError(f"{self.folder}: tensor {name} is missing")
        try:
            if path.name not in self._open:
                self._headers[path]
                self._open[path.name] = safe_open(path, "pt")
            tensor: Tensor = self._open[path.name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: {name}: {error}") from error
        return tensor

    def tensor(self, name: str) -> Tensor:
        shape = self.spec.tensor_shapes()[name]
        parts = [self._read(n).to(self.dtype) for n in source_names(HF_NAMES, self.spec, name)]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            packed = packed.expand(shape)  # one gain for all heads in the source
        if tuple(packed.shape) != shape:
            raise InputError(f"{self.folder}: {name}: expected shape {list(shape)}, got {list(packed.shape)}")
        return packed.contiguous()

    @functools.cached_property
    def _assets(self) -> dict[str, bytes]:
        assets: dict[str, bytes] = {}
        if any((self.folder / n).is_file() for n in _TOKENIZER_SOURCES):
            try:
                assets = tokenizer_assets(self.folder)
            except Exception as error:  # tokenizer classes raise many types on damaged files
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"{self.folder}: its tokenizer cannot be loaded: {reason}") from error
        else:
            _log.warning("%s: no tokenizer (one of %s)", self.folder, ", ".join(_TOKENIZER_SOURCES))
        generation = self.folder / GENERATION_CONFIG_FILE
        if generation.is_file():
            assets[GENERATION_CONFIG_FILE] = generation.read_bytes()
        return assets

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._assets
