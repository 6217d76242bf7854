"""What is in a checkpoint: sizes, plan, provenance and a map of its sub-layers."""

from __future__ import annotations

from typing import Any

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.container import DTYPE_NAMES
from depthprune_runtime.checkpoint.stored import quantization_to_json
from depthprune_runtime.errors import printable
from depthprune_runtime.export.parallel import pipeline_partitions, tensor_parallel_sizes
from depthprune_runtime.export.targets import fitting
from depthprune_runtime.plan import Edit, Flatten, Narrow, PrunePlan
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, SublayerSpec


def _widths(sublayer: SublayerSpec) -> dict[str, int]:
    if isinstance(sublayer, AttentionSpec):
        return {
            "num_heads": sublayer.num_heads,
            "num_kv_heads": sublayer.num_kv_heads,
            "head_dim": sublayer.head_dim,
        }
    return {"intermediate_size": sublayer.intermediate_size}


def _blocks(checkpoint: Checkpoint) -> int:
    """Blocks of the dense model; for a source that does not say it, as far as sub-layers tell."""
    said = checkpoint.provenance.get("blocks")
    if said is not None:
        return int(said)
    spec = checkpoint.spec
    return 1 + max((block for sublayer in spec.sublayers for block in sublayer.origin), default=-1)


def _bits(checkpoint: Checkpoint, name: str) -> int:
    """Bits of one element of weight `name`."""
    quant = checkpoint.quantization.get(name)
    return 8 * checkpoint.dtype.itemsize if quant is None else quant.bits


def _deployment(spec: DecoderSpec) -> dict[str, Any]:
    """Exports and why they cannot hold the model, tensor-parallel sizes, layers of pipeline stages."""
    parallel = bool(spec.attention_sublayers())
    return {
        "exports": fitting(spec),
        "tensor_parallel_sizes": tensor_parallel_sizes(spec) if parallel else [],
        "pipeline_partitions": {str(n): part for n, part in pipeline_partitions(spec).items()} if parallel else {},
    }


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """JSON description. Bytes count weights as they are stored; parameters with and without embeddings."""
    spec = checkpoint.spec
    return {
        "name": checkpoint.name,
        "dtype": DTYPE_NAMES[checkpoint.dtype],
        "spec": spec.to_json(),
        "plan": checkpoint.plan,
        "provenance": {**checkpoint.provenance, "blocks": _blocks(checkpoint)},
        "parameters": spec.num_parameters(),
        "parameters_without_embeddings": spec.num_parameters(embeddings=False),
        "weight_bytes": checkpoint.weight_bytes(),
        "bytes_per_token": checkpoint.bytes_per_token(),
        "kv_bytes_per_token": spec.kv_bytes_per_token(checkpoint.dtype.itemsize),
        "quantization": quantization_to_json(checkpoint.quantization, spec),
        "head_bits": _bits(checkpoint, spec.head_name),
        **_deployment(spec),
        "sublayers": [
            {
                "index": i,
                "kind": s.kind,
                "origin": list(s.origin),
                "widths": _widths(s),
                "parameters": spec.sublayer_parameters(i),
                "bits": {
                    name.split(".")[2]: _bits(checkpoint, name)
                    for name in spec.sublayer_shapes(i)
                    if name.endswith("_proj.weight")
                },
            }
            for i, s in enumerate(spec.sublayers)
        ],
    }


def _map_line(kind: str, description: dict[str, Any], depth: int) -> str:
    """One character a block of the dense parent: `#` kept, `.` gone, a digit where that many share a sub-layer."""
    line = ["."] * depth
    for sublayer in description["sublayers"]:
        if sublayer["kind"] == kind:
            merged = len(sublayer["origin"])
            for block in sublayer["origin"]:
                line[block] = "#" if merged == 1 else str(min(merged, 9))
    return "".join(line)


def _ranking_lines(plan: PrunePlan | None) -> list[str]:
    """What went in which order, for a plan that ranked single sub-layers."""
    ranking = () if plan is None else plan.ranking()
    if plan is None or not ranking:
        return []
    lines = [
        "",
        f"removed in this order, with the distance ({printable(plan.settings['distance'])}) after each",
        f"{'step':>4}  {'kind':<10} {'block':<10} {'distance':>12}",
    ]
    for s in ranking:
        lines.append(f"{s.step:>4}  {s.kind:<10} {s.block:<10} {s.distance:>12.6g}")
    return lines


def _quantization_lines(description: dict[str, Any]) -> list[str]:
    """How many projections are quantised in which way; nothing for a dense model."""
    kinds: dict[str, int] = {}
    for quant in description["quantization"].values():
        symmetry = "symmetric" if quant["symmetric"] else "asymmetric"
        kind = f"{quant['bits']} bits in {symmetry} groups of {quant['group_size']}"
        kinds[kind] = kinds.get(kind, 0) + 1
    counted = ", ".join(f"{count} projections of {kind}" for kind, count in kinds.items())
    if not kinds:
        return []
    widths = sorted({f"W{quant['bits']}A8" for quant in description["quantization"].values()}, reverse=True)
    return [
        f"quantised   {counted}; head {description['head_bits']} bits",
        f"arithmetic  {', '.join(widths)} on a CPU (activations rounded to 8 bits) unless --activations differs",
    ]


def _deployment_lines(description: dict[str, Any]) -> list[str]:
    fits = [target for target, reason in description["exports"].items() if reason is None]
    lines = [f"exports     {', '.join(fits) or 'none'}"]
    lines += [f"            not {target}: {why}" for target, why in description["exports"].items() if why is not None]
    if sizes := description["tensor_parallel_sizes"]:
        lines.append(f"parallel    tensor-parallel sizes {', '.join(map(str, sizes))}")
    for stages, layers in description["pipeline_partitions"].items():
        lines.append(f"            {stages} stages: VLLM_PP_LAYER_PARTITION={','.join(map(str, layers))}")
    return lines


def _edit_text(edit: Edit) -> str:
    if isinstance(edit, Flatten):
        return f"flatten blocks {'+'.join(map(str, edit.blocks))}"
    if isinstance(edit, Narrow):
        return f"narrow {edit.sublayer} to {len(edit.keep)} units"
    return f"drop {edit.sublayer}"


def _plan_line(what: str, plan: PrunePlan) -> str:
    edits = ", ".join(_edit_text(e) for e in plan.edits)
    return f"{what:<12}{printable(plan.method)}: {edits or 'no edits'}"


def render(description: dict[str, Any]) -> str:
    """Description for people, every text out of the file printable and short."""
    plan = None if description["plan"] is None else PrunePlan.from_json(description["plan"])
    spec = description["spec"]
    depth = description["provenance"]["blocks"]
    source, form, family = (printable(description["provenance"].get(key)) for key in ("source", "format", "family"))
    kinds = [s["kind"] for s in description["sublayers"]]
    lines = [
        f"{printable(description['name'], 1000)}: {description['dtype']}, hidden_size {spec['hidden_size']}, "
        f"vocab_size {spec['vocab_size']}, context {spec['max_position_embeddings']}",
        f"source      {source} ({form}, {family})",
        f"sub-layers  {kinds.count('attention')} attention, {kinds.count('ffn')} FFN",
        f"parameters  {description['parameters']:,} "
        f"({description['parameters_without_embeddings']:,} without embeddings)",
        f"weights     {description['weight_bytes']:,} bytes",
        *_quantization_lines(description),
        f"per token   {description['bytes_per_token']:,} weight bytes read, "
        f"{description['kv_bytes_per_token']:,} KV cache bytes written",
    ]
    if plan is None:
        lines.append("plan        none: dense")
    else:
        earlier = [PrunePlan.from_json(data) for data in description["provenance"].get("plans", ())]
        lines += [_plan_line("first" if i == 0 else "then", made) for i, made in enumerate(earlier)]
        lines.append(_plan_line("plan", plan))
    lines += [
        *_deployment_lines(description),
        "by block of the parent (# kept, . gone)",
        f"  attention {_map_line('attention', description, depth)}",
        f"  ffn       {_map_line('ffn', description, depth)}",
        *_ranking_lines(plan),
        "",
        f"{'#':>4}  {'kind':<10} {'origin':<10} {'parameters':>12}  widths",
    ]
    for s in description["sublayers"]:
        origin = "+".join(map(str, s["origin"]))
        widths = ", ".join(f"{k} {v}" for k, v in s["widths"].items())
        bits = ", ".join(f"{name} {bits} bits" for name, bits in s["bits"].items())
        shown = f"{widths}; {bits}" if description["quantization"] else widths
        lines.append(f"{s['index']:>4}  {s['kind']:<10} {origin:<10} {s['parameters']:>12,}  {shown}")
    return "\n".join(lines)
