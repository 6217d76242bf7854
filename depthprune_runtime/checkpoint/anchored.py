"""Folders of our own Hugging Face class, as exported or as a trainer saved them; none of their Python runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from depthprune_runtime.checkpoint.anchored_layout import MODEL_TYPE, anchored_shapes, anchored_spec
from depthprune_runtime.checkpoint.description import Provenance, check_depth
from depthprune_runtime.checkpoint.gate import read_object
from depthprune_runtime.checkpoint.huggingface import HuggingFaceCheckpoint, refuse_quantized
from depthprune_runtime.fields import checked
from depthprune_runtime.plan import PrunePlan


class AnchoredCheckpoint(HuggingFaceCheckpoint):
    """What `export --to hf` wrote for a model that no stock class expresses: spec, plan and weights as they were."""

    def _stored_config(self) -> dict[str, Any]:
        stored = read_object(self.folder / "config.json")
        refuse_quantized(self.folder, stored)
        return stored

    def _full_config(self) -> dict[str, Any]:
        return self._stored_config()

    def _set_model(self, table: dict[str, tuple[str, ...]], config: Mapping[str, Any]) -> None:
        self.spec, per_head = anchored_spec(config, self._tied(config, table))
        self._shapes = self.spec.tensor_shapes()
        prefix = "" if table["norm.weight"][0].startswith("model.") else "model."  # of a base model saved alone
        self._parts = {
            name: {source.removeprefix(prefix): shape for source, shape in parts.items()}
            for name, parts in anchored_shapes(self.spec, per_head).items()
        }
        (shape,) = self._parts["embed_tokens.weight"].values()
        self._parts["embed_tokens.weight"] = {table["embed_tokens.weight"][0]: shape}
        lineage = checked(dict[str, Any], config.get(MODEL_TYPE) or {}, f"config.{MODEL_TYPE}")
        self.plan = lineage.get("plan")
        last = max(block for sublayer in self.spec.sublayers for block in sublayer.origin)
        own = {"source": self.name, "format": "huggingface", "family": MODEL_TYPE, "blocks": last + 1}
        stored = checked(dict[str, Any], lineage.get("provenance") or {}, f"config.{MODEL_TYPE}.provenance")
        self._lineage: dict[str, Any] = own | stored
        # refused here rather than where it is used
        plan = None if self.plan is None else PrunePlan.from_json(self.plan)
        check_depth(self.spec, plan, Provenance.from_json(self._lineage))

    def _origin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return self._lineage
