"""`depthprune env`: what this machine has, and which of it is in use."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from depthprune_runtime import __version__
from depthprune_runtime.cli.common import print_json, show
from depthprune_runtime.cli.parser import Parser

_PACKAGES = ("torch", "transformers", "tokenizers", "triton", "starlette", "uvicorn")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory": properties.total_memory})
    return found


def environment() -> dict[str, Any]:
    """What decides how a model runs here, for people and for bug reports."""
    import torch

    from depthprune_runtime.host.extension import built_against, extension

    module = extension()
    return {
        "depthprune_runtime": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "extension": module is not None,
        "extension_built_against_torch": built_against(),
        "cpu_levels": [] if module is None else module.cpu_levels(),
        "cpu_level": None if module is None else module.cpu_level(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
    }


def _env(args: argparse.Namespace) -> None:
    found = environment()
    if args.json:
        print_json(found)
        return
    gpus = [f"{g['name']} ({g['capability']}, {g['memory'] / 2**30:.0f} GiB)" for g in found["gpus"]]
    kernels = f"{found['cpu_level']} (of {', '.join(found['cpu_levels'])})" if found["extension"] else "plain torch"
    rows = {
        "depthprune_runtime": found["depthprune_runtime"],
        "python": f"{found['python']}, {found['platform']}",
        "packages": ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items()),
        "C++ extension": f"built against torch {found['extension_built_against_torch']}"
        if found["extension"]
        else "no",
        "CPU kernels": kernels,
        "threads": f"{found['threads']} of {found['cpus']} CPUs",
        "GPUs": ", ".join(gpus) or "none",
    }
    show("\n".join(f"{name:20}{value}" for name, value in rows.items()))


def add_env(commands: Any, common: Parser) -> None:
    p = commands.add_parser("env", parents=[common], help="what this machine has, and which kernels run on it")
    p.set_defaults(run=_env)
