"""Claims about what is left of a model's quality. Real weights of those sizes are not here: ours are SmolLM2-135M's."""

from __future__ import annotations

import shlex
from typing import Any

from report.claim import NEEDS_PAPER, WEIGHTS, Check, Claim, Cpu, Gpu, Quality, Quantized, cpu_command, gpu_command

_HUB = {
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-2-13B": "meta-llama/Llama-2-13b-hf",
    "Qwen1.5-7B": "Qwen/Qwen1.5-7B",
    "Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "Llama-3-70B": "meta-llama/Meta-Llama-3-70B",
    "Mamba-2.8B": "state-spaces/mamba-2.8b-hf",
}
_GB = {"Llama-2-7B": 14, "Llama-2-13B": 26, "Qwen1.5-7B": 16, "Llama-3-8B": 16, "Llama-3-70B": 141, "Mamba-2.8B": 6}
_PAPER_TASKS = "piqa,winogrande,hellaswag,arc_easy,arc_challenge"
# Of FinerCut's published configuration: 1000 rows each without shots, MMLU with 5 shots and 50 rows a subject.
_FINERCUT_TASKS = "openbookqa,piqa,hellaswag,winogrande,arc_easy,arc_challenge,boolq,lambada_openai"
_MMLU = (
    "python -m depthprune_runtime.evaluation.lm_eval_adapter --model depthprune "
    "--model_args pretrained=pruned.safetensors --tasks mmlu"
)
# Name in the rows, as printed in the paper and with our repair.
_PRINTED = {"shortgpt": "ShortGPT", "finercut": "FinerCut", "flattengpt": "FlattenGPT"}
_WHERE = {
    "shortgpt": "in BlockPruner's protocol, not ShortGPT's own tables",
    "finercut": "measured by others, not the paper's own table",
    "flattengpt": f"main table; its number {NEEDS_PAPER}",
}
_BLOCK_PRUNER = "2406.10594"
_BLOCKS = {"Llama-2-7B": 32, "Llama-2-13B": 40}
_ARXIV = {"shortgpt": "2403.03853", "finercut": "2405.18218", "flattengpt": "2602.08858"}
_VARIANT = {"shortgpt": "shortgpt", "finercut": "finercut, fast", "flattengpt": "flattengpt"}


def here(variant: str, blocks: int) -> str:
    start = f"python benchmarks/bench_quality.py {WEIGHTS} --variants {shlex.quote(variant)} --blocks {blocks},0"
    return f"{start} --repairs none,ridge --seeds 0,1,2"


def true_size(model: str, method: str, steps: str, metric: str) -> str:
    prune = f"depthprune prune {_HUB[model]} -o pruned.safetensors --method {method} {steps} --repair none"
    prune += " --calibration wikitext2"
    if metric == "perplexity":
        return f"{prune} && depthprune perplexity pruned.safetensors --text wikitext2-test --rows --seq-len 2048"
    if method == "finercut":
        evaluate = f"depthprune evaluate pruned.safetensors --tasks {_FINERCUT_TASKS} --limit 1000"
        return f"{prune} && {evaluate} && {_MMLU} --num_fewshot 5 --limit 50"
    return f"{prune} && depthprune evaluate pruned.safetensors --tasks {_PAPER_TASKS}"


def needs(model: str) -> str:
    size = _GB.get(model)
    return f"the real weights ({size} GB) and a device that holds them" if size else "the real weights"


def checks(method: str, blocks: int, metric: str) -> tuple[Check, ...]:
    return tuple(Quality(_VARIANT[method], blocks, repair, metric) for repair in ("none", "ridge"))


def _row(
    method: str, model: str, ratio: str, metric: str, value: float, steps: str, blocks: int, dense: float | None
) -> Claim:
    """One perplexity or zero-shot average. blocks: of SmolLM2's 30, the nearest share that has rows."""
    ppl, own = metric == "perplexity", method == "flattengpt"
    note = ""
    if dense is not None:
        kept = f"{value / dense:.2f}x" if ppl else f"{100 * value / dense:.1f}% kept"
        note = f"dense {dense:g}{'' if own else ', as FlattenGPT has it'}: {kept}"
    return Claim(
        name=f"{method}-{model.lower()}-{ratio.partition('%')[0]}-{metric}",
        method=_PRINTED[method],
        model=model,
        ratio=ratio,
        what="WikiText-2 perplexity at 2048" if ppl else "mean of five zero-shot tasks",
        value=value,
        unit="" if ppl else "% accuracy",
        note=note,
        arxiv=_ARXIV[method],
        where=_WHERE[method],
        checks=checks(method, blocks, metric),
        here=here(_VARIANT[method], blocks),
        true_size=true_size(model, method, steps, metric),
        needs=needs(model),
        headline=model == "Llama-2-7B" and method != "finercut",
    )


# model, ratio, blocks fewer, dense and pruned perplexity, dense and pruned zero-shot
_FLATTENGPT = (
    ("Llama-2-7B", "21%", 7, 5.47, 8.68, 69.00, 62.49),
    ("Llama-2-13B", "24%", 10, 4.88, 6.68, 71.76, 67.50),
    ("Qwen1.5-7B", "21%", 8, 7.95, 16.05, 65.48, 57.00),
)
_SHORTGPT = (
    ("Llama-2-7B", "21.02%", 7, 18.45, 58.18),
    ("Llama-2-13B", "24.37%", 10, 20.06, 62.60),
    ("Qwen1.5-7B", "20.97%", 8, 49.88, 53.26),
)
_FINERCUT = (
    ("Llama-2-7B", ((10.4, 6.61, 3), (19.8, 8.38, 6), (30.2, 12.12, 6))),
    ("Llama-2-13B", ((9.9, 5.41, 3), (19.9, 6.43, 6), (30.8, 8.48, 6))),
)


def _rows() -> list[Claim]:
    dense_of = {row[0]: row[3] for row in _FLATTENGPT}
    found = []
    for model, ratio, fewer, dense_ppl, ppl, dense_acc, acc in _FLATTENGPT:
        steps = f"--blocks {fewer}"
        found.append(_row("flattengpt", model, ratio, "perplexity", ppl, steps, 9, dense_ppl))
        found.append(_row("flattengpt", model, ratio, "zero-shot", acc, steps, 9, dense_acc))
    for model, ratio, fewer, ppl, acc in _SHORTGPT:
        steps = f"--blocks {fewer}"
        found.append(_row("shortgpt", model, ratio, "perplexity", ppl, steps, 9, dense_of[model]))
        found.append(_row("shortgpt", model, ratio, "zero-shot", acc, steps, 9, None))
    for model, points in _FINERCUT:
        for percent, ppl, blocks in points:
            steps = f"--sparsity {percent / 100:.3f}"
            found.append(_row("finercut", model, f"{percent}%", "perplexity", ppl, steps, blocks, dense_of[model]))
    return found


def _kept(name: str, model: str, ratio: str, value: float, steps: str, blocks: int | None) -> Claim:
    """Of FinerCut. blocks: of SmolLM2's 30 in parameters; None: no row of ours can stand beside it."""
    return Claim(
        name=name,
        method="FinerCut",
        model=model,
        ratio=ratio,
        what="share of the dense model's performance kept",
        value=value,
        unit="%",
        note="nine tasks of its published configuration",
        arxiv=_ARXIV["finercut"],
        where=f"section {NEEDS_PAPER}; tasks from its code",
        checks=checks("finercut", blocks, "zero-shot") if blocks else (),
        here=here(_VARIANT["finercut"], blocks) if blocks else "",
        true_size=true_size(model, "finercut", steps, "zero-shot"),
        needs=needs(model),
        headline=True,
    )


def _alone(name: str, model: str, what: str, value: float, unit: str, where: str, lacks: str, **more: Any) -> Claim:
    """A claim of ShortGPT, unless `more` says otherwise, that no command measures here unless `more` has one."""
    known: dict[str, Any] = {
        "method": "ShortGPT",
        "arxiv": _ARXIV["shortgpt"],
        "ratio": "25%",
        "here": "",
        "checks": (),
    }
    known |= {"name": name, "model": model, "what": what, "value": value, "unit": unit, "where": where, "needs": lacks}
    return Claim(**{"true_size": "", **known, **more})


def _other_claims() -> list[Claim]:
    """Recovery, quantisation and other families."""
    seven = "Llama-2-7B"
    weights, accuracy = f"{needs(seven)}, and MMLU", "% accuracy"
    orders = "bf16;shortgpt as printed, then int4;int4, then shortgpt as printed"
    gptq = {
        "ratio": "27.1%",
        "here": f"python benchmarks/bench_quantization.py {WEIGHTS} --variants '{orders}'",
    }
    drop, mmlu = "--method shortgpt --blocks 9 --repair none", "--tasks mmlu"
    drop_first = f"depthprune prune {_HUB[seven]} -o pruned.safetensors {drop}"
    drop_first += " && depthprune quantize pruned.safetensors -o small.safetensors --bits 4"
    drop_last = f"depthprune quantize {_HUB[seven]} -o small.safetensors --bits 4"
    drop_last += f" && depthprune prune small.safetensors -o pruned.safetensors {drop}"
    return [
        _alone(
            "flattengpt-llama-2-7b-20-recovered", seven, "mean of five zero-shot tasks", 66.24, accuracy,
            f"recovery; its number {NEEDS_PAPER}",
            "LoRA over 50k rows of instructions, which the project does not have: its own repair stands beside it",
            method="FlattenGPT", arxiv=_ARXIV["flattengpt"], ratio="20%", here=here("flattengpt", 6),
            note="recovered by LoRA from 63.83; dense 69: 96.0% kept",
            checks=(Quality("flattengpt", 6, "ridge", "zero-shot"),),
        ),
        _alone(
            "shortgpt-post-training", "not recorded", "mean of 13 tasks after post-training", 43.16, accuracy,
            "Table 6", "post-training, which the project does not have: its own repair stands beside it", ratio="24%",
            here=here("shortgpt", 9), note="41.22 without",
            checks=(Quality("shortgpt", 9, "ridge", "zero-shot"),),
        ),
        _alone(
            "shortgpt-13b-mmlu", "Llama-2-13B", "MMLU", 52.2, accuracy, "sections 1 and 7",
            f"{needs('Llama-2-13B')}, and MMLU", ratio="10 of 40 blocks", note="dense 55.0: 94.9% kept",
            true_size=f"depthprune prune {_HUB['Llama-2-13B']} -o pruned.safetensors --method shortgpt --blocks 10 "
            f"--repair none && {_MMLU} --num_fewshot 5",
        ),
        _alone(
            "shortgpt-mmlu-drop-then-4-bit", seven, "MMLU, dropped and then 4 bits", 41.2, accuracy,
            "with quantisation", weights, **gptq, note="dense 45.4: 90.7% kept; model inferred",
            checks=(Quantized("shortgpt as printed, then int4"),),
            true_size=f"{drop_first} && depthprune evaluate small.safetensors {mmlu}",
        ),
        _alone(
            "shortgpt-mmlu-4-bit-then-drop", seven, "MMLU, 4 bits and then dropped", 42.4, accuracy,
            "with quantisation", weights, **gptq, note="dense 45.4: 93.4% kept; model inferred",
            checks=(Quantized("int4, then shortgpt as printed"),),
            true_size=f"{drop_last} && depthprune evaluate pruned.safetensors {mmlu}",
        ),
        _alone(
            "shortgpt-mamba", "Mamba-2.8B", "mean of 13 tasks", 37.18, accuracy, "Table 3",
            needs("Mamba-2.8B") + ", and the 13 tasks by lm-eval over Transformers: our runtime does not run Mamba",
            note="dense 41.12: 90.4% kept",
            true_size=f"depthprune prune {_HUB['Mamba-2.8B']} -o pruned --blocks 16 --repair none",
        ),
        _alone(
            "shortgpt-rwkv", "RWKV-v5-7B", "mean of 13 tasks", 36.85, accuracy, "Table 3",
            "a family that is not supported (RWKV-4 is), its weights and the 13 tasks", note="dense 50.37: 73.2% kept",
        ),
        *map(_thirteen_tasks, _TABLE_2),
        *map(_block_pruner_latency, _APPENDIX_F),
    ]  # fmt: skip


# model, per cent removed, mean of 13 tasks dense and pruned, per cent kept
_TABLE_2 = (
    ("Llama-2-7B", 27.1, 47.78, 41.24, 86.31),
    ("Llama-2-13B", 24.6, 55.14, 50.53, 91.64),
    ("Baichuan2-7B", 24.2, 57.67, 49.08, 85.10),
    ("Baichuan2-13B", 24.7, 62.31, 54.43, 87.35),
)
# model, per cent removed, blocks fewer, ms dense and pruned
_APPENDIX_F = (
    ("Llama-2-7B", 24.03, 8, 4044.30, 3094.36),
    ("Llama-2-13B", 21.93, 9, 7285.73, 4111.65),
)


def _thirteen_tasks(row: tuple[str, float, float, float, float]) -> Claim:
    """Of ShortGPT's own mean over 13 tasks; ours beside it is of the papers' five."""
    model, percent, dense, pruned, kept = row
    lacks = f"{needs(model)}, and the 13 tasks" if model in _HUB else "a family that is not supported, and the 13 tasks"
    return _alone(
        f"shortgpt-{model.lower()}-{percent}-13-tasks", model, "mean of 13 tasks", pruned, "% accuracy", "Table 2",
        lacks, ratio=f"{percent}%", note=f"dense {dense}: {kept:.2f}% kept", here=here("shortgpt", 9),
        checks=checks("shortgpt", 9, "zero-shot"),
    )  # fmt: skip


def _block_pruner_latency(row: tuple[str, float, int, float, float]) -> Claim:
    """ShortGPT's speed as others measured it. Whether the 128 tokens are read or written is not recorded: no floor."""
    model, percent, blocks, before, after = row
    share = f"{blocks} of {_BLOCKS[model]} blocks fewer"
    subset = "" if 4 * blocks == _BLOCKS[model] else "with a quarter of the blocks fewer"
    return _alone(
        f"shortgpt-{model.lower()}-{percent}-latency", model, "latency of 128 tokens", round(before / after, 2), "x",
        f"BlockPruner's measurement (arXiv {_BLOCK_PRUNER}, appendix F)", "a GPU of 80 GB; random weights do",
        ratio=f"{percent}%", note=f"{before:.2f} to {after:.2f} ms; {share}; batch not given",
        arxiv=_BLOCK_PRUNER,
        checks=(Gpu(model.lower(), "ours shortgpt 25%", "decode1", "", subset), Cpu("shortgpt 25%", "decode1@32")),
        here=cpu_command("shortgpt 25%", "decode1@32"), true_size=gpu_command(model.lower(), "shortgpt 25%", "decode1"),
    )  # fmt: skip


def quality_claims() -> tuple[Claim, ...]:
    attentions = "--sublayers 34 --only attention"
    return (
        _kept("finercut-8b-kept", "Llama-3-8B", "25% of sub-layers", 90, "--sublayers 16", 6),
        _kept("finercut-70b-kept", "Llama-3-70B", "30% of sub-layers", 95, "--sublayers 48", 6),
        _kept("finercut-70b-attention-kept", "Llama-3-70B", "34 of 80 attentions", 99, attentions, None),
        *_rows(),
        *_other_claims(),
    )
