"""What a launcher would launch on, plain torch computes, too: other shapes and dtypes are refused before a kernel reads
by address. Nothing is launched."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the launchers cannot be imported")

from degenerate_calls import BASES, Draw, calls, copied
from op_cases import plain
from triton.runtime.jit import JITFunction

from depthprune_runtime.ops._triton import LAUNCHERS

# No launcher looks at values, and no caller has such tensors.
VALUES = (": all ", ": last ", "NaN", "meta", "sparse", "one element for all", "None")


def refused(name: str, arguments: tuple[Any, ...]) -> BaseException | None:
    """Why plain torch does not compute it; None also where only a value lies out of range."""
    try:
        plain(name)(*map(copied, arguments))
    except (ArithmeticError, ValueError, RuntimeError, TypeError, LookupError) as error:
        return None if "out of bounds" in str(error) else error
    return None


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_plain_torch_refuses_is_not_launched(name: str) -> None:
    launcher = getattr(importlib.import_module(f"depthprune_runtime.kernels.{LAUNCHERS[name]}"), name)
    launches: list[Any] = []
    with mock.patch.object(JITFunction, "run", lambda kernel, *_, **__: launches.append(kernel)):
        for dtype in (torch.bfloat16, torch.float32):
            for what, arguments in calls(BASES[name](Draw(dtype, torch.Generator().manual_seed(0)))):
                if any(part in what for part in VALUES):
                    continue
                launches.clear()
                try:
                    launcher(*map(copied, arguments))
                except ValueError:
                    assert what != "nothing", "the usual arguments are refused"
                    continue
                assert launches or what != "nothing", "the usual arguments launch nothing"
                if launches:
                    error = refused(name, arguments)
                    assert error is None, f"{dtype}, {what}: launched, but plain torch says {error!r}"
