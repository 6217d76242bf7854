"""Folders of DeciLM models (`nemotron-nas`): blocks that may lack a half; none of their Python runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from depthprune_runtime.checkpoint.gate import read_object
from depthprune_runtime.checkpoint.huggingface import HuggingFaceCheckpoint, refuse_quantized
from depthprune_runtime.checkpoint.paired_layout import deci_spec


class DeciCheckpoint(HuggingFaceCheckpoint):
    """A folder with `block_configs` and Llama's tensor names."""

    def _stored_config(self) -> dict[str, Any]:
        stored = read_object(self.folder / "config.json")
        refuse_quantized(self.folder, stored)
        return stored

    def _full_config(self) -> dict[str, Any]:
        return self._stored_config()

    def _set_model(self, table: dict[str, tuple[str, ...]], config: Mapping[str, Any]) -> None:
        self._set_parts(table, deci_spec(config, self._tied(config, table)))
