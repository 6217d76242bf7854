"""One definition a name in the extension: see definitions.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from definitions import clashes, definitions

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".inc"))


def test_every_name_is_defined_once() -> None:
    assert clashes(SOURCES) == {}


@pytest.mark.parametrize(
    ("file", "names"),
    [
        (
            "common/row_strides_of.h",
            ["depthprune::with_row_strides(const at::Tensor&)", "depthprune::row_strides_of(const at::Tensor&)"],
        ),
        ("cpu/rows/op.cpp", ["depthprune::linear_kernel(Dtype, int64_t)"]),
        ("cpu/step/step.h", ["depthprune::DecodeStep", "depthprune::FfnLayer"]),
        ("cpu/pointwise/norm.cpp", ["depthprune::norm_plain(const Norm&, int64_t, int64_t)"]),
        ("cuda/norm.h", ["depthprune::cuda::Norm"]),
        (
            "cpu/attention/avx512.cpp",
            ["depthprune::attention::attend_avx512(const Problem&, const Task&, Scratch&, float*)"],
        ),
    ],
)
def test_definitions_are_found(file: str, names: list[str]) -> None:
    assert set(names) <= definitions(CSRC / file)


def test_what_an_anonymous_namespace_holds_is_its_files_own() -> None:
    assert not {
        name
        for name in definitions(CSRC / "cpu" / "pointwise" / "norm.cpp")
        if "square_sum" in name or "::run(" in name
    }


def test_a_clash_is_found(tmp_path: Path) -> None:
    """An inline function in a header and another of that name in a source: the linker says nothing."""
    header, source = tmp_path / "a.h", tmp_path / "b.cpp"
    header.write_text("namespace n {\n// rows\ninline Tensor with_rows(const Tensor& t) { return t; }\n}\n")
    source.write_text("namespace n {\nTensor with_rows(const Tensor& x) { return x + 1; }\nstruct S { int a; };\n}\n")
    other = tmp_path / "c.cpp"
    other.write_text("namespace n {\nvoid with_rows(int64_t a) {}\nnamespace {\nstruct S { long a; };\n}\n}\n")
    assert clashes([header, source, other]) == {"n::with_rows(const Tensor&)": [header, source]}
