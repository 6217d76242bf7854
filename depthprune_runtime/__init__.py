"""Make large language models shallower, and run the result at the speed a shallower model promises.

from depthprune_runtime import Runtime, prune
prune("MODEL", "pruned.safetensors", method="shortgpt", sparsity=0.2)
print(Runtime.load("pruned.safetensors").generate("Once upon a time"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from depthprune_runtime.checkpoint.writing import import_model
    from depthprune_runtime.engine.async_engine import AsyncEngine
    from depthprune_runtime.engine.engine import Engine
    from depthprune_runtime.engine.errors import EngineDead, EngineFull
    from depthprune_runtime.engine.options import EngineOptions
    from depthprune_runtime.engine.outputs import CompletionOutput, RequestOutput
    from depthprune_runtime.engine.params import SamplingParams
    from depthprune_runtime.engine.runtime import Runtime
    from depthprune_runtime.errors import InputError
    from depthprune_runtime.evaluation.perplexity import perplexity
    from depthprune_runtime.export.export import export_model
    from depthprune_runtime.fitting.options import RepairOptions
    from depthprune_runtime.healing.heal import heal
    from depthprune_runtime.healing.options import HealOptions
    from depthprune_runtime.pruning.finercut.options import FinerCutOptions
    from depthprune_runtime.pruning.flattengpt.options import FlattenGPTOptions
    from depthprune_runtime.pruning.prune import prune
    from depthprune_runtime.pruning.shortgpt.options import ShortGPTOptions
    from depthprune_runtime.quantization.quantize import quantize

__all__ = [
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineDead",
    "EngineFull",
    "EngineOptions",
    "FinerCutOptions",
    "FlattenGPTOptions",
    "HealOptions",
    "InputError",
    "RepairOptions",
    "RequestOutput",
    "Runtime",
    "SamplingParams",
    "ShortGPTOptions",
    "__version__",
    "export_model",
    "heal",
    "import_model",
    "perplexity",
    "prune",
    "quantize",
]

# Loaded on first use: importing the package for its version must not import torch.
_HOMES = {
    "AsyncEngine": "engine.async_engine",
    "CompletionOutput": "engine.outputs",
    "Engine": "engine.engine",
    "EngineDead": "engine.errors",
    "EngineFull": "engine.errors",
    "EngineOptions": "engine.options",
    "FinerCutOptions": "pruning.finercut.options",
    "FlattenGPTOptions": "pruning.flattengpt.options",
    "HealOptions": "healing.options",
    "InputError": "errors",
    "RepairOptions": "fitting.options",
    "RequestOutput": "engine.outputs",
    "Runtime": "engine.runtime",
    "SamplingParams": "engine.params",
    "ShortGPTOptions": "pruning.shortgpt.options",
    "export_model": "export.export",
    "heal": "healing.heal",
    "import_model": "checkpoint.writing",
    "perplexity": "evaluation.perplexity",
    "prune": "pruning.prune",
    "quantize": "quantization.quantize",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
