"""Which targets can hold a model, and what to say where one cannot."""

from __future__ import annotations

from depthprune_runtime.errors import InputError
from depthprune_runtime.export import deci, gguf, huggingface
from depthprune_runtime.export.names import TARGETS, Target
from depthprune_runtime.spec import DecoderSpec

_REFUSES = {"hf": huggingface.refuses, "gguf": gguf.refuses, "deci": deci.refuses}


def refuses(target: Target, spec: DecoderSpec) -> str | None:
    """Why `target` cannot hold `spec`, and which other one can; None where it can."""
    if beyond := spec.beyond_llama():
        return f"no target of ours says {', '.join(sorted(beyond))} yet"
    reason = _REFUSES[target](spec)
    if reason is None:
        return None
    others = [other for other in TARGETS if other != target and _REFUSES[other](spec) is None]
    return f"{reason}; {f'--to {others[0]} can hold it' if others else 'no other target can hold it'}"


def check_target(target: str, spec: DecoderSpec, name: str) -> None:
    """Raises InputError in one line where `target` is none, or cannot hold the model called `name`."""
    known = next((t for t in TARGETS if t == target), None)
    if known is None:
        raise InputError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    reason = refuses(known, spec)
    if reason is not None:
        raise InputError(f"{name}: {known}: {reason}")


def fitting(spec: DecoderSpec) -> dict[str, str | None]:
    """Target -> why it cannot hold `spec`, or None."""
    return {target: refuses(target, spec) for target in TARGETS}
