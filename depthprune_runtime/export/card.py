"""The model card of an exported folder: what the model is, what it was made of, and how to run it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import printable
from depthprune_runtime.plan import PrunePlan

_USE = {
    "depthprune": "The architecture is in two Python files of this folder, which Transformers (5.15 or newer) runs:",
    "nemotron-nas": "vLLM, SGLang, TensorRT-LLM and MLX-LM have this architecture (DeciLM, `nemotron-nas`).",
}


@dataclass(frozen=True)
class CardFacts:
    """What only the caller knows. license: as the hub names it; perplexity: a text, such as `12.3 on wikitext2`."""

    license: str | None = None
    perplexity: str | None = None


def _front_matter(checkpoint: Checkpoint, facts: CardFacts) -> list[str]:
    source = checkpoint.provenance.get("source")
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if facts.license is not None:
        lines.append(f"license: {json.dumps(facts.license)}")
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/")):
        lines.append(f"base_model: {json.dumps(source)}")
    return [*lines, "tags: [depth-pruned, depthprune]", "---", ""]


def _plan_lines(plan: PrunePlan) -> list[str]:
    counts: dict[str, int] = {}
    for edit in plan.edits:
        counts[edit.kind] = counts.get(edit.kind, 0) + 1
    edits = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    shown = {**plan.to_json(), "settings": {k: v for k, v in plan.settings.items() if k != "ranking"}}
    return [
        f"- Method: {printable(plan.method)}",
        f"- Edits: {edits}",
        "",
        "<details><summary>Plan, in the parent's numbering</summary>",
        "",
        "```json",
        json.dumps(shown, separators=(",", ":")),
        "```",
        "",
        "</details>",
    ]


def _use_lines(kind: str) -> list[str]:
    remote = ", trust_remote_code=True" if kind == "depthprune" else ""
    if kind == "nemotron-nas":
        return [_USE[kind]]
    code = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto"{remote})',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
    ]
    return [
        _USE.get(kind, f"Transformers' own class (`{kind}`) runs it, as does whatever knows that class:"),
        "",
        *code,
    ]


def model_card(checkpoint: Checkpoint, kind: str, title: str, facts: CardFacts) -> str:
    """README.md of the exported `checkpoint`; kind: the layout of the folder."""
    spec = checkpoint.spec
    plan = None if checkpoint.plan is None else PrunePlan.from_json(dict(checkpoint.plan))
    source = printable(checkpoint.provenance.get("source") or checkpoint.name)
    attentions, ffns = len(spec.attention_sublayers()), len(spec.ffn_sublayers())
    blocks = checkpoint.provenance.get("blocks")
    lines = [
        *_front_matter(checkpoint, facts),
        f"# {printable(title)}",
        "",
        f"Made from `{source}` by depthprune_runtime" + (", which took depth out of it." if plan else "."),
        "",
        f"- Parameters: {spec.num_parameters():,} ({spec.num_parameters(embeddings=False):,} without embeddings)",
        f"- Sub-layers: {attentions} attention, {ffns} FFN"
        + (f"; the parent has {blocks} of each" if plan and blocks else ""),
        f"- KV cache: {spec.kv_bytes_per_token(2):,} bytes a token in 16 bits",
    ]
    if facts.perplexity is not None:
        lines.append(f"- Perplexity: {printable(facts.perplexity)}")
    if facts.license is None:
        lines.append("- License: that of the parent model")
    if plan is not None:
        lines += _plan_lines(plan)
    return "\n".join([*lines, "", "## Use", "", *_use_lines(kind), ""])
