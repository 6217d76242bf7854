"""The cases that test_ops.py runs on a GPU hold on the CPU: they, and what checks them, are right."""

from __future__ import annotations

import pytest
import torch
from op_case import Case, Draw
from op_cases import CASES, plain, verify

from depthprune_runtime.ops._library import REFERENCES


def quantised(case: Case) -> bool:
    """The CPU's kernels round inputs of quantised weights to 8 bits, by design: no case of the rule."""
    return any(isinstance(a, list) and len(a) > 1 and a[0] is not None for a in case.arguments(torch.float16)[3:4])


SMALL = [case for cases in CASES.values() for case in cases if "big" not in case.name and not quantised(case)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_cases(case: Case) -> None:
    verify(case, torch.bfloat16, torch.device("cpu"))


def test_every_case_is_of_an_op() -> None:
    assert set(CASES) <= set(REFERENCES)
    assert {case.op for cases in CASES.values() for case in cases} == set(CASES)


def check(monkeypatch: pytest.MonkeyPatch, implementation: object, message: str) -> None:
    """`verify` refuses `implementation` of silu_mul."""

    class Op:
        default = staticmethod(implementation)  # type: ignore[arg-type]
        _schema = torch.ops.depthprune.silu_mul.default._schema

    Op.default._schema = Op._schema  # type: ignore[attr-defined]
    case = Case("silu_mul", "own", lambda draw: (draw(3, 8),))
    monkeypatch.setattr(torch.ops.depthprune, "silu_mul", Op)
    with pytest.raises(AssertionError, match=message):
        verify(case, torch.float16, torch.device("cpu"))


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = REFERENCES["silu_mul"], iter(range(9))
    check(monkeypatch, lambda x: right(x) * 1.01, "largest error")
    check(monkeypatch, lambda x: right(x) + next(calls) * 1e-2, "differs from run to run")
    check(monkeypatch, lambda x: torch.empty(3, 4, dtype=x.dtype), "values are not finite")
    check(monkeypatch, lambda x: right(x.as_strided((3, 8), (9, 1))), "values are not finite")  # reads beyond its rows


def test_draws_repeat() -> None:
    case = CASES["linear"][0]
    assert torch.equal(case.arguments(torch.float16)[0], case.arguments(torch.float16)[0])
    assert Draw(torch.float16, torch.Generator())(2, 3).dtype == torch.float16


def test_plain_runs_no_kernel() -> None:
    """A reference made of ops runs their references: the C++ kernels would refuse float64."""
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(10, 8, dtype=torch.float64)
    gate, up = (x @ weight.t()).chunk(2, dim=-1)
    torch.testing.assert_close(plain("gated_linear")(x, weight, None), torch.nn.functional.silu(gate) * up)
