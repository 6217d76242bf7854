"""Lets Triton's interpreter run loops whose bounds a kernel computes.

Triton 3.6 takes int() of the one-element array that is a scalar there; numpy 2.4 refuses arrays that have a dimension.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


def allow_loop_bounds() -> None:
    original = getattr(interpreter, "_patch_lang_tensor", None)
    if original is None or list(inspect.signature(original).parameters) != ["tensor", "scope"]:
        return  # another Triton

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
