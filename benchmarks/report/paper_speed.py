"""Every claim of the three papers that is recorded, as data; a figure that is not, stands here as needing its paper."""

from __future__ import annotations

import dataclasses

from public_models import SPECS, prefill_flops, shortened
from report.claim import (
    NEEDS_PAPER,
    Claim,
    Cpu,
    Exact,
    Floor,
    Gpu,
    cpu_command,
    decode_floor,
    gpu_command,
    prefill_floor,
)
from report.paper_quality import quality_claims

SHORTGPT, FINERCUT, FLATTENGPT = "2403.03853", "2405.18218", "2602.08858"


def _flattengpt_70b(prefill: bool) -> tuple[Floor, ...]:
    """A fifth of the blocks is 19.8 % of the parameters; the fewest that reach 20 % are 17."""
    dense = SPECS["llama-2-70b"]
    found = []
    for blocks in (16, 17):
        after, what = shortened(dense, blocks), f"{blocks} of 80 blocks fewer"
        found.append(
            prefill_floor(dense, after, 2048, what) if prefill else decode_floor(dense, after, 64, 64 + 64, what)
        )
    return tuple(found)


_SLEB = f"table of speeds, in the settings of SLEB's (2 A100); its number {NEEDS_PAPER}"
_SUBSET = "20 of the 80 blocks, 4 of them merged away; the rest of the depth repeats them"
_GPU_70B = (
    "an 80 GB GPU for a quarter of the depth (35 GB of random weights); all 138 GB need several, and tensor "
    "parallelism, which is not built"
)
SPEED = (
    Claim(
        name="flattengpt-70b-throughput",
        method="FlattenGPT",
        model="Llama-2-70B",
        ratio="20%",
        what="throughput of generation, batch 64, prompt 64, 128 new",
        value=1.27,
        unit="x",
        arxiv=FLATTENGPT,
        where=_SLEB,
        checks=(
            Gpu("llama-2-70b/4", "ours flattengpt 20%", "decode64", "64 x 64 + 128", _SUBSET),
            Cpu("flattengpt 20%", "decode8"),
            Cpu("flattengpt 20%", "decode8", model="random-llama-1b"),
        ),
        here=cpu_command("flattengpt 20%", "decode8"),
        true_size=gpu_command("llama-2-70b/4", "flattengpt 20%", "decode64", "--prompt", "64", "--tokens", "128"),
        needs=_GPU_70B,
        floors=lambda: _flattengpt_70b(prefill=False),
        headline=True,
    ),
    Claim(
        name="flattengpt-70b-latency",
        method="FlattenGPT",
        model="Llama-2-70B",
        ratio="20%",
        what="latency of processing a prompt of 2048 tokens, batch 1",
        value=1.26,
        unit="x",
        arxiv=FLATTENGPT,
        where=_SLEB,
        checks=(
            Gpu("llama-2-70b/4", "ours flattengpt 20%", "prefill2048", "", _SUBSET),
            Cpu("flattengpt 20%", "prefill512"),
            Cpu("flattengpt 20%", "prefill512", model="random-llama-1b"),
        ),
        here=cpu_command("flattengpt 20%", "prefill512"),
        true_size=gpu_command("llama-2-70b/4", "flattengpt 20%", "prefill2048"),
        needs=_GPU_70B,
        floors=lambda: _flattengpt_70b(prefill=True),
        headline=True,
    ),
)


def _gptq(layers: int, speedup: float) -> Claim:
    """Throughput with GPTQ and fewer layers of 32. The batch is not given, and no floor holds for every batch."""
    fewer = 32 - layers
    claim = Claim(
        name=f"shortgpt-gptq-throughput-{layers}",
        method="ShortGPT",
        model="Llama-2-7B",
        ratio=f"{_share('llama-2-7b', fewer, True):.1f}%",
        what=f"throughput with GPTQ, 4 bits, 32 to {layers} layers",
        note="batch not given",
        value=speedup,
        unit="x",
        arxiv=SHORTGPT,
        where="Table 4 (Llama-2-7B-Base GPTQ)",
        checks=(),
        here="",
        true_size="",
        needs=f"4-bit weights and {fewer} of 32 blocks fewer in the whole models of bench_gpu.py",
    )
    if layers != 23:
        return claim
    return dataclasses.replace(
        claim,
        name="shortgpt-gptq-throughput",
        ratio="27.1%",
        note="4331.23 to 5146.99 tokens/s; batch not given",
        checks=(
            Cpu("shortgpt 25%", "decode1@32", "int4"),
            Cpu("shortgpt 25%", "decode8", "int4"),
            Gpu("llama-2-7b", "ours shortgpt 25%", "decode1", "", "in bf16: no 4-bit kernel runs on a GPU yet"),
        ),
        here=cpu_command("shortgpt 25%", "decode1@32", "decode8", precision="int4"),
        true_size=gpu_command("llama-2-7b", "shortgpt 25%", "decode1"),
        needs="4-bit weights in the whole models of bench_gpu.py; the command measures 8 of 32 blocks fewer in bf16",
        headline=True,
    )


def _share(model: str, blocks: int, embeddings: bool) -> float:
    dense = SPECS[model]
    left = shortened(dense, blocks).num_parameters(embeddings) / dense.num_parameters(embeddings)
    return 100 * (1 - left)


_COUNTED = "nothing: it follows from the shapes"


def _shortgpt_sizes() -> tuple[Claim, ...]:
    dense, less = SPECS["llama-2-13b"], shortened(SPECS["llama-2-13b"], 10)
    compute = 100 * (1 - prefill_flops(less, 2048) / prefill_flops(dense, 2048))
    return (
        Claim(
            name="shortgpt-parameters",
            method="ShortGPT",
            model="Llama-2-13B",
            ratio="10 of 40 blocks",
            what="parameters removed",
            value=25,
            unit="%",
            arxiv=SHORTGPT,
            where="sections 1 and 7",
            checks=(
                Exact("all parameters", _share("llama-2-13b", 10, True), "%"),
                Exact("without embeddings and head", _share("llama-2-13b", 10, False), "%"),
            ),
            here="python benchmarks/claims.py --json",
            true_size="depthprune prune meta-llama/Llama-2-13b-hf -o pruned.safetensors --method shortgpt --blocks 10 "
            "--repair none --json",
            needs=_COUNTED,
            headline=True,
        ),
        Claim(
            name="shortgpt-compute",
            method="ShortGPT",
            model="Llama-2-13B",
            ratio="10 of 40 blocks",
            what="compute removed",
            value=25,
            unit="%",
            arxiv=SHORTGPT,
            where="sections 1 and 7",
            checks=(
                Exact("operations of a prompt of 2048 tokens", compute, "%"),
                Gpu("llama-2-13b", "ours shortgpt 25%", "prefill2048"),
                Cpu("shortgpt 25%", "prefill512"),
            ),
            here=cpu_command("shortgpt 25%", "prefill512"),
            true_size=gpu_command("llama-2-13b", "shortgpt 25%", "prefill2048"),
            needs="a GPU of 40 GB; random weights do",
            floors=lambda: (prefill_floor(dense, less, 2048, "10 of 40 blocks fewer"),),
            headline=True,
        ),
    )


def _finercut_sizes() -> tuple[Claim, ...]:
    large = SPECS["llama-3-70b"]
    without = shortened(large, attentions=34)
    cache = 100 * (1 - without.kv_bytes_per_token(2) / large.kv_bytes_per_token(2))
    share = 100 * (1 - without.num_parameters() / large.num_parameters())
    return (
        Claim(
            name="finercut-8b-size",
            method="FinerCut",
            model="Llama-3-8B",
            ratio="25% of sub-layers",
            what="sub-layers removed",
            value=16,
            unit="of 64 sub-layers",
            note="its own tables and speedups are not to be had",
            arxiv=FINERCUT,
            where=f"section {NEEDS_PAPER}",
            checks=(
                *(Exact(f"all parameters, {n} of 16 attentions", _finercut_share(n), "%") for n in (16, 11)),
                Gpu("llama-3-8b", "ours finercut 25%", "decode1"),
                Cpu("finercut 25%", "decode1@1024"),
                Cpu("finercut 25%", "prefill512"),
            ),
            here=cpu_command("finercut 25%", "decode1@1024", "prefill512"),
            true_size=gpu_command("llama-3-8b", "finercut 25%", "decode1 prefill2048"),
            needs="a GPU of 24 GB; random weights do",
            floors=_finercut_8b,
            headline=True,
        ),
        Claim(
            name="finercut-70b-size",
            method="FinerCut",
            model="Llama-3-70B",
            ratio="34 of 80 attentions",
            what="attention sub-layers removed",
            value=34,
            unit="of 80 attentions",
            note="its own tables and speedups are not to be had",
            arxiv=FINERCUT,
            where=f"section {NEEDS_PAPER}",
            checks=(Exact("KV cache", cache, "%"), Exact("all parameters", share, "%")),
            here="python benchmarks/claims.py --json",
            true_size="depthprune prune meta-llama/Meta-Llama-3-70B -o pruned.safetensors --method finercut "
            "--sublayers 34 --only attention --repair none --json",
            needs=_COUNTED,
            floors=lambda: tuple(
                decode_floor(large, without, 64, context, "34 attentions fewer") for context in (128, 8192)
            ),
            headline=True,
        ),
    )


def _finercut_share(attentions: int) -> float:
    dense = SPECS["llama-3-8b"]
    left = shortened(dense, 0, attentions, 16 - attentions)
    return 100 * (1 - left.num_parameters() / dense.num_parameters())


def _finercut_8b() -> tuple[Floor, ...]:
    """How the 16 sub-layers divide is not recorded: all attention, and what the benchmark's shapes take."""
    dense = SPECS["llama-3-8b"]
    return tuple(
        decode_floor(dense, shortened(dense, 0, attentions, 16 - attentions), 1, 1024, f"{attentions} attentions of 16")
        for attentions in (16, 11)
    )


CLAIMS: tuple[Claim, ...] = (
    *SPEED,
    *(_gptq(layers, speedup) for layers, speedup in ((23, 1.19), (24, 1.16), (27, 1.10), (29, 1.06))),
    *_shortgpt_sizes(),
    *_finercut_sizes(),
    *quality_claims(),
)
