"""LoRA adapters as PEFT saves them, merged into the weights of a Hugging Face folder as they are read.

    W + alpha / r * B A        alpha / sqrt(r) with rsLoRA; of an embedding W + alpha / r * (B A)'

Modules are matched by the names of the folder's own tensors, so stock folders and exported ones are alike. Whole
tensors in an adapter (`modules_to_save`, trained biases) replace the folder's. Everything else is refused: what an
adapter holds and is not merged would be lost unseen. Sources: Hu et al., arXiv 2106.09685; rsLoRA, arXiv 2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint.container import read_header
from depthprune_runtime.checkpoint.gate import read_object, reading
from depthprune_runtime.checkpoint.mapped import MappedFile
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.fields import from_fields
from depthprune_runtime.spec import Shape

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
_TIED = ("embed_tokens", "lm_head")  # modules that may share one tensor
_FLOATS = ("BF16", "F16", "F32", "F64")
_MAX_PATTERN = 200  # characters of a regular expression
_REPEATED_GROUP = re.compile(r"\)[*+?{]")  # what takes exponential time to match
# Keys of a config that change what an adapter's tensors mean.
_REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "lora_ga_config",
    "megatron_config",
)
# Adapters of these begin at the base's weights as they are; the others (pissa, olora, corda, loftq) change them first.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Config:
    """What the scale of an addition depends on. Patterns are regular expressions for the end of a module's name."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def scale(self, module: str) -> tuple[int, float]:
        """(rank, factor of B A) of `module`."""
        rank = _by_pattern(self.rank_pattern, module, self.r)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        if rank < 1:
            raise InputError(f"r: expected a rank from 1 on, got {rank} for {printable(module)}")
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """As in PEFT: the first pattern that the end of the name matches, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _check_pattern(pattern: str) -> None:
    good = len(pattern) <= _MAX_PATTERN and not _REPEATED_GROUP.search(pattern)
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        good = False
    if not good:
        raise InputError(f"pattern: expected a plain regular expression, got {printable(pattern, 60)}")


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"adapter {folder}: no {CONFIG_FILE}; expected a folder that PEFT saved")
    with reading(path):
        stored = read_object(path)
        kind = stored.get("peft_type")
        if kind != "LORA":
            raise InputError(f"peft_type: expected LORA, got {printable(repr(kind))}; merge it with PEFT first")
        if used := next((key for key in _REFUSED if stored.get(key)), None):
            raise InputError(f"{used}: expected it unused, got {printable(stored[used], 60)}; merge it with PEFT first")
        initial = stored.get("init_lora_weights", True)
        if not any(initial is known or (isinstance(known, str) and initial == known) for known in _INITIAL):
            raise InputError(
                f"init_lora_weights: {printable(repr(initial), 60)} changes the base's weights; merge with PEFT first"
            )
        known = {f.name for f in fields(_Config)}
        given = {k: v for k, v in stored.items() if k in known and v is not None}
        config = from_fields(_Config, given, "adapter_config")
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            _check_pattern(pattern)
    return config


@dataclass(frozen=True)
class _Addition:
    """B A of one module. down, up: names in the file; embedding: whether it is added transposed."""

    down: str
    up: str
    scale: float
    embedding: bool


class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    Raises InputError for an adapter of another kind, and for one that holds what would not be merged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _read_config(folder)
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise InputError(f"adapter {folder}: no {WEIGHTS_FILE}; save the adapter with safe_serialization")
        with reading(path):
            header = {name: entry for name, entry in read_header(path).items() if name != "__metadata__"}
        self.file = MappedFile(path)
        self._shapes: dict[str, Shape] = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self._additions: dict[str, _Addition] = {}  # by the folder's tensor, once `match` has seen it
        self._whole: dict[str, str] = {}  # likewise; the adapter's tensor that replaces it
        for name, entry in header.items():
            if entry["dtype"] not in _FLOATS or not name.startswith(_PREFIX):
                raise InputError(
                    f"adapter {folder}: tensor {printable(name)}: expected {_PREFIX}* in {', '.join(_FLOATS)}, "
                    f"got {printable(entry['dtype'])}"
                )

    def match(self, stored: Mapping[str, Shape], tied: bool) -> None:
        """Find the tensor of the folder that each tensor of the adapter changes.

        stored: name -> shape of the folder's tensors; tied: whether embedding and head are one. Raises InputError for
        what the folder does not have.
        """
        changed = next((n for n in self._shapes if any(part in n.split(".") for part in _TIED)), None)
        if tied and changed is not None:
            raise InputError(
                f"adapter {self.folder}: it holds {printable(changed)}, but embedding and head are one tensor here; "
                "untie them in the base model first"
            )
        pairs: dict[str, dict[str, str]] = {}
        for name in self._shapes:
            found = _LOW_RANK.fullmatch(name.removeprefix(_PREFIX))
            if found is None:
                self._match_whole(name, stored)
            else:
                pairs.setdefault(found[1], {})[found[2] or found[3]] = name
        for module, names in pairs.items():
            self._match_addition(module, names, stored)
        if not self._additions and not self._whole:
            raise InputError(f"adapter {self.folder}: it holds no tensors")

    def _own_name(self, name: str, stored: Mapping[str, Shape]) -> str:
        """The folder's name of tensor `name`: a base model saved alone has no prefix."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in stored:
                return candidate
        raise InputError(
            f"adapter {self.folder}: the model has no {printable(name)}; give the folder that it was trained on"
        )

    def _match_whole(self, name: str, stored: Mapping[str, Shape]) -> None:
        plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        own = self._own_name(plain, stored)
        if self._shapes[name] != stored[own]:
            raise InputError(
                f"adapter {self.folder}: {printable(name)}: expected shape {list(stored[own])}, "
                f"got {list(self._shapes[name])}"
            )
        self._whole[own] = name

    def _match_addition(self, module: str, names: Mapping[str, str], stored: Mapping[str, Shape]) -> None:
        own = self._own_name(f"{module}.weight", stored)
        if set(names) != {"A", "B"}:
            raise InputError(f"adapter {self.folder}: {printable(module)}: expected lora_A and lora_B, got one of them")
        with reading(self.folder / CONFIG_FILE):
            rank, scale = self._config.scale(module)
        if len(stored[own]) != 2:
            raise InputError(f"adapter {self.folder}: {printable(module)}: expected additions to a matrix")
        embedding = "lora_embedding_" in names["A"]
        rows, columns = stored[own] if not embedding else stored[own][::-1]
        expected = {"A": (rank, columns), "B": (rows, rank)}
        for part, shape in expected.items():
            if self._shapes[names[part]] != shape:
                raise InputError(
                    f"adapter {self.folder}: {printable(names[part])}: expected shape {list(shape)}, "
                    f"got {list(self._shapes[names[part]])}"
                )
        self._additions[own] = _Addition(names["A"], names["B"], scale, embedding)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Tensor `name` of the folder with what the adapter does to it, in the dtype of `weight`."""
        whole, addition = self._whole.get(name), self._additions.get(name)
        if whole is not None:
            weight = self.file.tensor(whole).to(weight.dtype)
        if addition is None:
            return weight
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        down, up = (self.file.tensor(part).to(wide) for part in (addition.down, addition.up))
        added = (up @ down) * addition.scale
        return (weight.to(wide) + (added.T if addition.embedding else added)).to(weight.dtype)

    def description(self) -> dict[str, Any]:
        """For the provenance of what was merged."""
        return {"source": self.folder.name, "additions": len(self._additions), "replaced": len(self._whole)}
