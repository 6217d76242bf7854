"""Names of the targets, for the command line; nothing heavy is imported."""

from __future__ import annotations

from typing import Literal

Target = Literal["hf", "gguf", "deci"]
TARGETS: tuple[Target, ...] = ("hf", "gguf", "deci")
EXPORT_DTYPES = ("bf16", "fp16", "fp32")
