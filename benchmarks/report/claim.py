"""What a claim is, how it is checked here, and the floor that no runtime goes below."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from public_models import decode_bytes, prefill_flops, quantized_decode_bytes

from depthprune_runtime.spec import DecoderSpec

WEIGHTS = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS_PAPER = "needs the paper"
# Numbers of the papers that no source at hand has: they are neither claimed nor compared here.
NOT_TO_BE_HAD = (
    "FinerCut's own tables and speedups; its perplexities of Llama-2 are a third party's",
    "FlattenGPT's rows of Llama-3 and Baichuan",
)


def cpu_command(variant: str, *cases: str, precision: str = "bf16") -> str:
    start = f"python benchmarks/bench_cpu.py {WEIGHTS} --models smollm2-135m --precisions {precision} --runtimes ours"
    return f"{start} --variants dense {shlex.quote(variant)} --rounds 9 --results cpu_alone --cases {' '.join(cases)}"


def gpu_command(model: str, variant: str, cases: str, *more: str) -> str:
    start = f"python benchmarks/bench_gpu.py --models {model} --variants {shlex.quote(variant)} --no-peers"
    return " ".join([start, "--cases", cases, *more])


@dataclass(frozen=True)
class Floor:
    """The least work before and after. `unit`: GB a decode step reads, or TFLOP of a prompt."""

    before: float
    after: float
    unit: str
    how: str

    @property
    def speedup(self) -> float:
        return self.before / self.after

    def __str__(self) -> str:
        return f"{self.speedup:.3f}x: {self.before:,.1f} to {self.after:,.1f} {self.unit} ({self.how})"


def decode_floor(before: DecoderSpec, after: DecoderSpec, batch: int, context: int, what: str, bits: int = 16) -> Floor:
    """Bytes a step at `context` tokens a request; 4 or 8 `bits` with groups of 128, both models alike."""
    sizes = [
        decode_bytes(s, batch, context) if bits == 16 else quantized_decode_bytes(s, bits, 128, batch, context)
        for s in (before, after)
    ]
    return Floor(sizes[0] / 1e9, sizes[1] / 1e9, "GB a step", f"{what}; batch {batch}, context {context}, {bits} bits")


def prefill_floor(before: DecoderSpec, after: DecoderSpec, tokens: int, what: str) -> Floor:
    flops = [prefill_flops(s, tokens) / 1e12 for s in (before, after)]
    return Floor(flops[0], flops[1], "TFLOP", f"{what}; one prompt of {tokens} tokens")


@dataclass(frozen=True)
class Cpu:
    """A speedup over our dense model in cpu.csv or cpu_alone.csv: a smaller model, about the same share removed."""

    variant: str
    case: str
    precision: str = "bf16"
    model: str = "smollm2-135m"


@dataclass(frozen=True)
class Gpu:
    """A speedup over our dense model in gpu.csv, at the true size; `subset`: of what part of the depth, if not all."""

    model: str
    runtime: str
    case: str
    settings: str = ""
    subset: str = ""


@dataclass(frozen=True)
class Quality:
    """SmolLM2 with `blocks` of 30 fewer: times the dense perplexity, or per cent of its zero-shot accuracy kept."""

    variant: str
    blocks: int
    repair: str
    metric: str  # perplexity or zero-shot


@dataclass(frozen=True)
class Quantized:
    """Perplexity of `variant` over that of `base` in quantization.csv."""

    variant: str
    base: str = "bf16"


@dataclass(frozen=True)
class Exact:
    """Follows from the shapes alone: measuring adds nothing."""

    label: str
    value: float
    unit: str


Check = Cpu | Gpu | Quality | Quantized | Exact


@dataclass(frozen=True)
class Claim:
    """One number of a paper.

    value, unit: as claimed, `note` what belongs to it; where: section or table as far as known. checks: what the rows
    can say. here, true_size: commands, the second for the model of the claim. needs: what the true size would take.
    headline: stands in the README.
    """

    name: str
    method: str
    model: str
    ratio: str
    what: str
    value: float
    unit: str
    arxiv: str
    where: str
    checks: tuple[Check, ...]
    here: str
    true_size: str
    needs: str
    note: str = ""
    floors: Callable[[], tuple[Floor, ...]] = tuple
    headline: bool = False

    @property
    def claimed(self) -> str:
        number = f"{self.value:.2f}x" if self.unit == "x" else f"{self.value:g} {self.unit}".replace(" %", "%").strip()
        return f"{number} ({self.note})" if self.note else number
