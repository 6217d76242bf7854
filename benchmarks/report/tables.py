"""Tables of README.md and docs/, made from the recorded rows.

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from report import quality_tables, search_tables, tuning_tables
from report.claims import readme_table
from report.rows import NOT_MEASURED, ROOT, Row, last, markdown, newest, read

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def decode_table() -> str:
    """Cases by candidates: tokens per second (seconds where nothing is generated) and the speedup."""
    rows = newest("decode_cpu", "case", "candidate")
    candidates = ("transformers dense", "ours dense", "ours 6 of 30 dropped")
    lines = []
    for case in dict.fromkeys(case for case, _ in rows):
        cells = []
        for candidate in candidates:
            row = rows.get((case, candidate))
            if row is None:
                cells.append("")
                continue
            rate = float(row["tokens_per_s"])
            value = f"{rate:,.1f} tok/s" if rate else f"{float(row['median_s']):.2f} s"
            ratio = float(row["speedup_over_transformers"])
            cells.append(value if candidate == candidates[0] else f"{value} ({ratio:.2f}x)")
        lines.append([case, *cells])
    return markdown(("", "Transformers 5", "ours, dense", "ours, 6 of 30 blocks dropped"), lines)


def engine_table() -> str:
    rows = newest("engine_cpu", "test", "candidate")
    lines = []
    for test in dict.fromkeys(test for test, _ in rows):
        ours, theirs = rows.get((test, "ours")), rows.get((test, "transformers"))
        if ours is None:
            continue
        cells = ["" if r is None else f"{float(r['value']):.3g} {r['unit']}" for r in (ours, theirs)]
        lines.append([test, *cells, ours["note"]])
    return markdown(("", "ours", "Transformers continuous batching", ""), lines)


CPU_SPEEDS = ("decode1@32", "decode1@1024", "decode8", "prefill512")
CPU_NAMES = ("decode, batch 1", "decode, batch 1, context 1024", "decode, batch 8", "prefill 512")
CPU_RUNTIMES = ("transformers", "vllm", "llama.cpp", "openvino", "ours")


def cpu_table(model: str, results: str = "cpu") -> str:
    """Runtimes of each precision: tokens a second, of ours with the ratio to the best peer; load time and memory."""
    rows = last([r for r in read(results) if r["model"] == model], "precision", "runtime", "variant", "what")
    names = dict.fromkeys(key[:3] for key in rows if key[1] in CPU_RUNTIMES)
    lines = []
    for precision in ("bf16", "int8", "int4"):
        own = [name for name in names if name[0] == precision]
        for name in sorted(own, key=lambda n: CPU_RUNTIMES.index(n[1])):
            cells = [_cpu_cell(rows.get((*name, what))) for what in (*CPU_SPEEDS, "load_s", "rss_mb")]
            version = next(row["runtime_version"] for key, row in rows.items() if key[:3] == name)
            label = f"ours, {name[2]}" if name[1] == "ours" else f"{name[1]} {version.partition('-')[0]}"
            lines.append([precision, label, *cells])
    heads = ("", "", "decode, batch 1", "at context 1024", "decode, batch 8", "prefill 512", "load", "memory")
    return markdown(heads, lines)


def _cpu_cell(row: Row | None) -> str:
    if row is None:
        return ""
    value = float(row["median"])
    if row["unit"] != "tokens/s":
        return f"{value:,.2f} s" if row["unit"] == "s" else f"{value:,.0f} MB"
    compared = row["runtime"] == "ours" and row["ratio_to_best_peer"]
    return f"{value:,.1f}" + (f" ({float(row['ratio_to_best_peer']):.2f}x)" if compared else "")


def speed_table() -> str:
    """The short form of `cpu`: the best peer of every case and ours, with the ratio to it."""
    rows = last([r for r in read("cpu") if r["model"] == "smollm2-135m"], "precision", "runtime", "variant", "what")
    variants = dict.fromkeys(key[2] for key in rows if key[1] == "ours")
    lines = []
    for precision in ("bf16", "int8", "int4"):
        for what, name in zip(CPU_SPEEDS, CPU_NAMES, strict=True):
            own = [rows.get((precision, "ours", variant, what)) for variant in variants]
            best = next((row["best_peer"] for row in own if row), "")
            peer = rows.get((precision, best, "dense", what))
            lines.append([precision, name, f"{_cpu_cell(peer)} {best}".strip(), *map(_cpu_cell, own)])
    return markdown(("", "", "best peer", *(f"ours, {variant}" for variant in variants)), lines)


def gain_table() -> str:
    """Decode at batch 1: what pruned models gain, as a share of what the bytes they no longer read promise."""
    models = {"smollm2-135m": "SmolLM2-135M", "random-llama-1b": "random 1B Llama"}
    rows = last([r for r in read("cpu") if r["what"] == "decode1@32"], "model", "precision", "variant", "runtime")
    variants = dict.fromkeys(r["variant"] for r in rows.values() if r["gain_of_bytes"])
    columns = [(model, precision) for model in models for precision in ("bf16", "int8", "int4")]
    lines = []
    for variant in variants:
        gains = [rows.get((*column, variant, "ours"), {}).get("gain_of_bytes") for column in columns]
        lines.append([variant, *(f"{float(gain):.2f}" if gain else "" for gain in gains)])
    return markdown(("", *(f"{models[model]}, {precision}" for model, precision in columns)), lines)


# Name and what it is compared with: itself without quantisation.
QUANTIZED = {
    "bf16": "",
    "int8": "bf16",
    "int4": "bf16",
    "int4, gptq only": "bf16",
    "int4, round to nearest": "bf16",
    "q4_0 of llama.cpp": "bf16",
    "shortgpt": "",
    "shortgpt, then int8": "shortgpt",
    "shortgpt, then int4": "shortgpt",
    "shortgpt as printed": "",
    "shortgpt as printed, then int4": "shortgpt as printed",
    "int4, then shortgpt as printed": "shortgpt as printed",
}


def quantization_table() -> str:
    """What quantised models lose, alone and with pruning in both orders."""
    rows = {variant: row for (variant,), row in newest("quantization", "variant").items()}
    lines = []
    for variant, base in {**QUANTIZED, **{v: "" for v in rows if v not in QUANTIZED}}.items():
        row, whole = rows.get(variant), rows.get(base)
        if row is None:
            lines.append([variant, NOT_MEASURED, NOT_MEASURED, ""])
            continue
        value = float(row["perplexity"])
        more = "" if whole is None else f"{100 * (value / float(whole['perplexity']) - 1):+.1f} %"
        lines.append([variant, f"{float(row['weight_mb']):.0f} MB", f"{value:.2f}", more])
    return markdown(("", "weights", "perplexity", "over the same in bf16"), lines)


# What the README compares: label, variant in `quantization`, blocks of `quality` fewer (where the same model stands).
CHOICE = (
    ("dense, bf16", "bf16", "0"),
    ("dense, 8 bits", "int8", None),
    ("dense, 4 bits", "int4", None),
    ("3 of 30 blocks fewer, bf16", "shortgpt", "3"),
    ("3 of 30 blocks fewer, 8 bits", "shortgpt, then int8", None),
    ("3 of 30 blocks fewer, 4 bits", "shortgpt, then int4", None),
)


def choice_table() -> str:
    """Bytes and perplexity of pruning, quantising and both; a dense bf16 file takes 2 bytes a parameter."""
    quantized = {variant: row for (variant,), row in newest("quantization", "variant").items()}
    quality = quality_tables.quality_rows()
    repaired = (("dense", "none"), ("shortgpt", "ridge"))
    kept = {str(r["blocks_fewer"]): r for r in quality if (r["variant"], r["repair"]) in repaired}
    lines = []
    for label, variant, blocks in CHOICE:
        row, same = quantized.get(variant), kept.get(blocks or "")
        if row is not None:
            size, value = float(row["weight_mb"]), float(row["perplexity"])
        elif same is not None:
            size, value = 2e-6 * same["parameters"], same["perplexity"]
        else:
            lines.append([label, NOT_MEASURED, NOT_MEASURED])
            continue
        lines.append([label, f"{size:.0f} MB", f"{value:.2f}"])
    return markdown(("SmolLM2-135M-Instruct", "weights", "perplexity"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "choice": choice_table,
    "decode": decode_table,
    "speed": speed_table,
    "cpu": lambda: cpu_table("smollm2-135m"),
    "cpu-1b": lambda: cpu_table("random-llama-1b"),
    "gain": gain_table,
    "cpu-avx2": lambda: cpu_table("smollm2-135m", "cpu_avx2"),
    "quality": quality_tables.quality_table,
    "ablation": quality_tables.ablation_table,
    "seeds": quality_tables.seeds_table,
    "texts": quality_tables.texts_table,
    "strength": tuning_tables.strength_table,
    "engine": engine_table,
    "quantization": quantization_table,
    "finercut": search_tables.finercut_table,
    "memory": search_tables.memory_table,
    "claims": readme_table,
}


def filled(text: str) -> str:
    """`text` with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        table = make()
        text = pattern.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)  # type: ignore[misc]
    return text
