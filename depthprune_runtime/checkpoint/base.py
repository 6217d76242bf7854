"""`Checkpoint`: what every source offers, whichever format it is stored in."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint.container import DTYPE_NAMES, TensorEntry, checksum
from depthprune_runtime.checkpoint.mapped import WatchedFile
from depthprune_runtime.checkpoint.stored import weight_entries
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.weights.quantized import QuantSpec
from depthprune_runtime.weights.rows import Stored

# Files carried inside a checkpoint, so that it moves alone.
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"


class Checkpoint(abc.ABC):
    """A model: spec, tensors read one by one, and the files around them.

    name: for messages; dtype: of all tensors that are not quantised; assets: file name -> contents (tokenizer,
    generation config); provenance: JSON object that says where the weights come from (source, format, family, blocks of
    the dense model); plan: JSON of the `PrunePlan` that made it, None for a dense model; quantization: weight name ->
    how it is quantised, for those that are; source_files: files and folders that its tensors are read from, which no
    output may replace; watched: those that are mapped while tensors are read.
    """

    name: str
    spec: DecoderSpec
    dtype: torch.dtype
    provenance: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    quantization: Mapping[str, QuantSpec] = MappingProxyType({})
    source_files: tuple[Path, ...] = ()
    watched: tuple[WatchedFile, ...] = ()

    @property
    @abc.abstractmethod
    def assets(self) -> Mapping[str, bytes]:
        """Tokenizer and generation config by file name; empty where the source has none."""

    @abc.abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Packed tensor `name` (see `DecoderSpec.tensor_shapes`) on the CPU in `dtype`, mapped if possible; what its
        codes stand for if it is quantised."""

    def weight(self, name: str) -> Stored:
        """Weight `name` as it is stored: what `tensor` gives, or quantised."""
        return self.tensor(name)

    def stored_checksum(self, entry: str) -> str | None:
        """Checksum that tensor `entry` of `entries` must have; None where no file says so, or it is computed."""
        return None

    def check_unchanged(self) -> None:
        """Raises InputError if a file that this is read from was written to since it was opened."""
        for file in self.watched:
            file.check_unchanged()

    def entries(self) -> dict[str, list[TensorEntry]]:
        """Weight name -> the tensors that it is stored as: one, or the parts of a quantised weight."""
        return weight_entries(self.spec, self.dtype, self.quantization)

    def weight_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(entry.nbytes for entries in self.entries().values() for entry in entries)

    def bytes_per_token(self) -> int:
        """Weight bytes that one decode step at batch 1 reads: `DecoderSpec.bytes_per_token`, quantised."""
        skipped = () if self.spec.tie_word_embeddings else ("embed_tokens.weight",)
        return sum(e.nbytes for name, entries in self.entries().items() if name not in skipped for e in entries)

    def checksums(self, on_tensor: Callable[[str], None] = lambda _: None) -> dict[str, str]:
        """Checksum of every weight tensor; reads them all unless the format stores them."""
        found = {}
        for name in self.spec.tensor_shapes():
            found[name] = checksum(self.tensor(name))
            on_tensor(name)
        return found

    def digest(self, on_tensor: Callable[[str], None] = lambda _: None) -> str:
        """Content digest over spec and weights: equal for the same model in any source format."""
        content = {
            "spec": self.spec.to_json(),
            "dtype": DTYPE_NAMES[self.dtype],
            "tensors": self.checksums(on_tensor),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
