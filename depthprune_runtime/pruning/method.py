"""What a pruning method is, and which there are. Imports no torch: the command line shows methods in its help.

A method is a file or a folder of its own, and one line in `METHODS`. docs/add-a-method.md has the steps.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.amount import Amount

if TYPE_CHECKING:
    import torch

    from depthprune_runtime.checkpoint import Checkpoint
    from depthprune_runtime.fitting.calibration import CalibrationSet
    from depthprune_runtime.plan import PrunePlan
    from depthprune_runtime.progress import Progress
    from depthprune_runtime.pruning.rebuild import Narrowing
    from depthprune_runtime.spec import DecoderSpec

METHODS: dict[str, str] = {  # name -> module that holds the method as METHOD
    "shortgpt": "depthprune_runtime.pruning.shortgpt.method",
    "finercut": "depthprune_runtime.pruning.finercut.method",
    "flattengpt": "depthprune_runtime.pruning.flattengpt.method",
}
DEFAULT = "shortgpt"


@dataclass(frozen=True)
class MethodOptions:
    """Base of every method's options: a frozen dataclass that checks itself. A field with `options.flag` in its
    metadata is a flag of `depthprune prune`."""


Options = TypeVar("Options", bound=MethodOptions)


@dataclass(frozen=True)
class Task:
    """What a method decides from.

    parent: the dense model; amount: how much goes; calibration: windows of token ids; digest: of the parent's content,
    for the plan.
    """

    parent: Checkpoint
    amount: Amount
    calibration: CalibrationSet
    device: torch.device
    digest: str
    progress: Progress


class Method(ABC, Generic[Options]):
    """How a method decides what goes. It writes nothing: surgery, narrowing, repair and writing follow its plan.

    name: as in `METHODS`; options: its options class; single_sublayers: whether it can drop a number of sub-layers;
    repair_strength: share of the repair's change that is written unless the caller chose one.
    """

    name: str
    options: type[Options]
    single_sublayers: bool = False
    repair_strength: float = 1.0

    def resolved(self, options: Options, repairs: bool) -> Options:
        """`options` with all that is open decided. Raises InputError for what makes no sense with or without a repair.

        Args:
            options: as the caller gave them.
            repairs: whether a repair follows.
        """
        return options

    @abstractmethod
    def windows(self, options: Options) -> tuple[int, int] | None:
        """Calibration windows that it decides from unless the caller chose others: (samples, seq_len); None: none."""

    @abstractmethod
    def check(self, amount: Amount, spec: DecoderSpec, options: Options) -> None:
        """Raise InputError for an amount that cannot go, before any long work."""

    @abstractmethod
    def decide(self, task: Task, options: Options) -> PrunePlan:
        """The plan. Its edits are in the parent's numbering, its settings hold all that decided it, as JSON."""

    def narrows(self, options: Options) -> bool:
        """Whether sub-layers are to be narrowed after the plan, which takes a walk over calibration windows."""
        return False

    def narrowing(self, parent: DecoderSpec, plan: PrunePlan, options: Options) -> Narrowing | None:
        """How what `plan` merges is narrowed; None: not at all."""
        return None


def load_method(name: str) -> Method[Any]:
    """The method of that name."""
    home = METHODS.get(name) if isinstance(name, str) else None
    if home is None:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    method: Method[Any] = importlib.import_module(home).METHOD
    return method


def all_methods() -> tuple[Method[Any], ...]:
    return tuple(load_method(name) for name in METHODS)


def method_options(name: str, values: Mapping[str, Any]) -> MethodOptions:
    """Options object of the method `name`; unknown fields are refused."""
    kind = load_method(name).options
    known = set(kind.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"method {name}: unknown options {unknown}; known are {sorted(known)}")
    options: MethodOptions = kind(**values)
    return options


def choose_method(name: str | None, options: MethodOptions | None) -> tuple[Method[Any], MethodOptions]:
    """The method that the caller means by its name, by its options, or by both, and its options."""
    if options is None:
        method = load_method(DEFAULT if name is None else name)
        return method, method.options()
    if name is not None:
        method = load_method(name)
        if type(options) is not method.options:
            raise InputError(
                f"options: expected {method.options.__name__} for method {name}, got {type(options).__name__}"
            )
        return method, options
    for method in all_methods():
        if type(options) is method.options:
            return method, options
    kinds = ", ".join(method.options.__name__ for method in all_methods())
    raise InputError(f"options: expected one of {kinds}, got {type(options).__name__}")
