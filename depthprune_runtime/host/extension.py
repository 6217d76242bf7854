"""The C++ extension `_C`: found once, and said loudly where it is missing, since what remains is several times slower.

It works with the torch that it was compiled against: another one has other symbols, or the same ones that mean other
things. `_build_info`, written when it was built, says which that was, also where `_C` cannot be loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from typing import Any

SWITCH = "DEPTHPRUNE_NO_EXTENSION"
_log = logging.getLogger("depthprune_runtime")
_CONSEQUENCES = (
    "CPU ops run as plain torch, several times slower, and CUDA has no kernels from C++. Reinstall with this torch: "
    "pip install --force-reinstall --no-deps --no-build-isolation depthprune_runtime; or do without: "
    f"{SWITCH}=1"
)


class ExtensionWarning(RuntimeWarning):
    """The C++ extension is not in use."""


def built_against() -> str | None:
    """The version of torch that the extension was compiled against, where it is known."""
    try:
        info = importlib.import_module("depthprune_runtime._build_info")
    except ImportError:
        return None
    return str(info.TORCH)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _load() -> tuple[Any | None, str]:
    """The extension, or why there is none."""
    import torch  # first: the extension's libraries are found through it

    name = "depthprune_runtime._C"
    if importlib.util.find_spec(name) is None:
        return None, "the C++ extension was not built"
    built = built_against()
    both = f"it was built against torch {built or 'of an unknown version'}, and this is torch {torch.__version__}"
    if built is not None and _minor(built) != _minor(torch.__version__):
        return None, f"the C++ extension is not loaded: {both}"
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"the C++ extension does not load: {both} ({error})"


@functools.cache
def extension() -> Any | None:
    """The module `_C`; None where it is missing, which is said once, or DEPTHPRUNE_NO_EXTENSION=1 asks for that."""
    if os.environ.get(SWITCH) == "1":
        return None
    module, reason = _load()
    if module is None:
        message = f"{reason}: {_CONSEQUENCES}"
        _log.warning(message)
        warnings.warn(message, ExtensionWarning, stacklevel=2)
    return module
