"""Every format holds the weight that it was made from; one table, and the modules of the formats, know which it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from depthprune_runtime import ops
from depthprune_runtime.kernels import packed
from depthprune_runtime.ops.projection import OPS
from depthprune_runtime.quantization.rtn import rtn
from depthprune_runtime.weights.packed import pack, unpack
from depthprune_runtime.weights.panels import PanelWeight, to_panels
from depthprune_runtime.weights.quantized import QuantSpec
from depthprune_runtime.weights.rows import RowsWeight, as_weight
from depthprune_runtime.weights.weight import Format, Weight

PACKAGE = Path(__file__).resolve().parents[2] / "depthprune_runtime"
CPU = torch.device("cpu")
N, K = 50, 70  # no whole panels, no whole groups
SOURCE = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()

# What a format may err by: rows and panels by nothing, codes by half a step and the rounding of its scale (2^-8) on
# each of up to `levels` steps.
MADE = {
    "rows": (RowsWeight(SOURCE), 0.0),
    "panels": (PanelWeight(to_panels(SOURCE), N, K), 0.0),
    "codes of 8 bits": (rtn(SOURCE, QuantSpec(8, 32)), 2 / 256),
    "codes of 4 bits": (rtn(SOURCE, QuantSpec(4, 32, False)), 2 / 16),
}


@pytest.fixture(params=MADE)
def made(request) -> tuple[Weight, float]:
    return MADE[request.param]


def test_every_format_is_tried():
    assert {weight.format for weight, _ in MADE.values()} == set(Format) == set(OPS)


def test_dense_is_what_it_was_made_from(made):
    weight, error = made
    assert weight.shape == (weight.out_features, weight.in_features) == (N, K)
    widest = SOURCE.float().abs().max()
    assert (weight.dense(torch.float32) - SOURCE.float()).abs().max() <= error * widest
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert weight.dense(dtype).dtype == dtype


def test_rows_are_those_of_dense(made):
    weight, _ = made
    ids = torch.tensor([N - 1, 0, 17, 17, 16])
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(weight.rows(ids, dtype), weight.dense(dtype)[ids])


def test_what_is_packed_can_be_unpacked(made):
    weight, _ = made
    tensors, layout = pack(weight)
    again = unpack(tensors, layout, K)
    assert (again.format, again.shape, again.precision) == (weight.format, weight.shape, weight.precision)
    assert all(a is b for a, b in zip(again.parts().values(), tensors, strict=True))
    assert weight.nbytes == sum(t.nbytes for t in tensors)
    assert torch.equal(again.dense(), weight.dense())


def test_map_and_to_keep_the_weight(made):
    weight, _ = made
    seen = []
    again = weight.map(lambda part: seen.append(part) or part.clone())
    assert {id(t) for t in seen} == {id(t) for t in weight.parts().values()}
    assert torch.equal(again.dense(), weight.dense())
    there = weight.to(CPU, torch.bfloat16)
    assert all(a is b for a, b in zip(there.parts().values(), weight.parts().values(), strict=True))


def test_only_codes_round_inputs(made):
    weight, _ = made
    assert weight.rounds_inputs
    assert weight.with_inputs_rounded(False).rounds_inputs == (weight.format is not Format.CODES)


@pytest.mark.parametrize("gated", [False, True])
def test_the_projection_is_that_of_dense(made, gated):
    weight, _ = made
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = ops.projection(x, weight.with_inputs_rounded(False), bias, gated).double()
    expected = x.double() @ weight.dense(torch.float64).T + bias.double()
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_tensor_is_a_weight_in_rows():
    weight = as_weight(SOURCE)
    assert weight.format is Format.ROWS and weight.dense() is SOURCE
    assert as_weight(MADE["panels"][0]) is MADE["panels"][0]
    with pytest.raises(ValueError, match=r"expected values of shape \[N, K\], got \[70\]"):
        as_weight(SOURCE[0])


def test_kernels_number_the_formats_alike():
    assert (packed.ROWS, packed.PANELS, packed.CODES) == (Format.ROWS, Format.PANELS, Format.CODES)


CLASSES = {"RowsWeight", "PanelWeight", "QuantizedWeight"}
# The modules that make or multiply by weights of one format. Everybody else knows `Weight` alone.
MAKERS = {
    "checkpoint/native.py",
    "ops/panel_linear.py",
    "ops/projection.py",
    "ops/quantized_linear.py",
    "quantization/gptq.py",
    "quantization/rtn.py",
    "quantization/view.py",
}


def asked_formats(tree: ast.AST) -> list[int]:
    """Lines that ask what kind of weight one is."""
    found = []
    for node in ast.walk(tree):
        asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type")
        if asks and CLASSES & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
            found.append(node.lineno)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Format":
            found.append(node.lineno)
    return sorted(found)


def test_only_one_table_outside_of_weights_knows_formats():
    asking, naming = set(), set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name.startswith(("weights/", "kernels/")):
            continue
        tree = ast.parse(path.read_text())
        if asked_formats(tree):
            asking.add(name)
        if CLASSES & {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}:
            naming.add(name)
    assert asking == {"ops/projection.py"}
    assert naming == MAKERS


def test_a_question_is_found():
    code = (
        "a = isinstance(w, QuantizedWeight)\nisinstance(w, (PanelWeight, int))\nw.format is Format.ROWS\nRowsWeight(w)"
    )
    assert asked_formats(ast.parse(code)) == [1, 2, 3]
