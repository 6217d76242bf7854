"""The op library: one schema, one plain-torch reference and any number of implementations per op.

The reference is registered under CompositeExplicitAutograd, so it serves every device that has no
implementation of its own and is the oracle of every test. C++ (csrc) and Triton (kernels) register
under CPU or CUDA and override it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "depthprune"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
REFERENCES: dict[str, Callable[..., Any]] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Define op `schema` with its `reference`; return the callable op.

    `fake` computes shapes only; needed where the reference reads values (lengths, block tables),
    which fake tensors do not have.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    REFERENCES[name] = reference
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    return packet.default  # type: ignore[no-any-return]


def bind(name: str, implementation: Callable[..., Any], dispatch_key: str) -> None:
    """Bind a Python-launched `implementation` (a Triton launcher) of op `name` to one device."""
    _LIBRARY.impl(name, implementation, dispatch_key)


def implementations(name: str) -> dict[str, str]:
    """Which dispatch keys of op `name` are served, and by what: `reference` or `native`."""
    found = {}
    for key in ("CPU", "CUDA"):
        native = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
        found[key] = "native" if native else "reference"
    return found
