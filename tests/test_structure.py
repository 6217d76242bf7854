"""The walls of the house: who may import whom, and what importing may do."""

from __future__ import annotations

import ast
import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "depthprune_runtime"
CSRC = ROOT / "csrc"
TRAVELS = PACKAGE / "export" / "folder_code"  # goes with a model to whoever has Transformers, and not the package

# Room -> rooms it may import from, besides itself. Rooms are modules or folders of the package.
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"cli"},
    "_build_info": set(),
    "errors": set(),
    "progress": set(),
    "fields": {"errors"},
    "options": {"errors"},
    "spec": {"errors", "fields"},
    "plan": {"errors", "fields", "spec"},
    "families": {"errors", "spec"},
    "paths": {"errors"},
    "texts": {"errors", "paths"},
    "host": {"_build_info", "errors"},
    "weights": {"errors", "host"},
    "checkpoint": {"errors", "fields", "progress", "spec", "plan", "families", "weights", "host", "paths"},
    "generation_config": {"checkpoint"},
    "text": {"errors", "checkpoint", "host"},
    "ops": {"weights", "host", "kernels"},
    "model": {"errors", "spec", "weights", "host", "ops", "_C"},
    "fitting": {"errors", "options", "spec", "checkpoint", "host", "model", "text", "texts"},
    "pruning": {
        "errors",
        "fields",
        "options",
        "paths",
        "plan",
        "progress",
        "spec",
        "texts",
        "weights",
        "checkpoint",
        "ops",
        "model",
        "host",
        "fitting",
    },
    "quantization": {
        "errors",
        "options",
        "progress",
        "spec",
        "texts",
        "weights",
        "checkpoint",
        "model",
        "host",
        "fitting",
    },
    "export": {"errors", "plan", "progress", "spec", "families", "checkpoint", "model", "host"},
    "healing": {"errors", "options", "progress", "spec", "texts", "text", "checkpoint", "model", "host"},
    "inspection": {"errors", "spec", "plan", "checkpoint", "export"},
    "engine": {
        "errors",
        "options",
        "spec",
        "generation_config",
        "weights",
        "checkpoint",
        "text",
        "ops",
        "model",
        "host",
    },
    "server": {"errors", "options", "engine", "text", "host"},
    "evaluation": {"errors", "progress", "engine", "model", "texts", "host", "paths"},
}
NO_TORCH = [
    "spec/decoder.py",
    "spec/sublayers.py",
    "spec/rope.py",
    "spec/checks.py",
    "families/decoder.py",
    "families/family.py",
    "families/config.py",
    "families/names.py",
    "families/rope.py",
    "errors.py",
    "texts.py",
    "paths.py",
    "fields.py",
    "options.py",
    "fitting/options.py",
    "plan.py",
    "pruning/plan.py",
    "pruning/amount.py",
    "pruning/shortgpt/options.py",
    "pruning/shortgpt/method.py",
    "pruning/finercut/options.py",
    "pruning/finercut/method.py",
    "pruning/finercut/goal.py",
    "pruning/flattengpt/options.py",
    "pruning/flattengpt/method.py",
    "quantization/options.py",
    "export/names.py",
    "inspection/picture.py",
    "healing/options.py",
    "host/sizes.py",
    "engine/request.py",
    "engine/outputs.py",
    "engine/options.py",
    "engine/params.py",
    "server/options.py",
    "engine/errors.py",
    "engine/kv_blocks.py",
    "engine/scheduler.py",
]


def imported(path: Path) -> set[str]:
    """Absolute names of everything `path` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent == TRAVELS, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if room(p) not in ("kernels", "cli") and p.parent != TRAVELS]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_directions(path):
    if path == PACKAGE / "__init__.py":
        return  # names homes for lazy loading and for type checkers only
    own = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "depthprune_runtime" and len(parts) > 1 and parts[1] != own:
            assert parts[1] in MAY_IMPORT[own], f"{own} must not import {name}"


@pytest.mark.parametrize("path", sorted(TRAVELS.glob("*.py")), ids=lambda p: p.name)
def test_code_that_travels_needs_torch_and_transformers_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert (TRAVELS / f"{node.module}.py").is_file(), f"{path}: {node.module}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            roots = {name.split(".")[0] for name in names}
            assert roots <= sys.stdlib_module_names | {"torch", "transformers"}, path


def test_every_room_has_a_rule():
    assert {room(p) for p in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("name", NO_TORCH)
def test_pure_modules_import_no_torch(name):
    assert not {n for n in imported(PACKAGE / name) if n.split(".")[0] == "torch"}


def test_nobody_imports_kernels_by_its_bare_name():
    folders = ("depthprune_runtime", "kernels", "benchmarks", "tests")
    for path in [p for f in folders for p in (ROOT / f).rglob("*.py")] + [ROOT / "setup.py"]:
        assert not {n for n in imported(path) if n.split(".")[0] == "kernels"}, path


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_tensors_only(path):
    """Launchers are below the ops that bind them: they import torch, Triton and each other."""
    for name in imported(path):
        assert not name.startswith("depthprune_runtime.") or name.split(".")[1] == "kernels", f"{path}: {name}"
        assert name.split(".")[0] in sys.stdlib_module_names | {"torch", "triton", "depthprune_runtime"}, name
    assert "torch.ops" not in path.read_text(), f"{path}: an op of the package is above its launcher"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


def test_the_package_and_its_help_are_light():
    code = "import sys, depthprune_runtime.cli as c; c.build_parser(); print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_loading_and_generating_needs_no_transformers(pico_file):
    code = (
        "import sys; from depthprune_runtime import Runtime; "
        f"r = Runtime.load({str(pico_file)!r}, device='cpu'); r.generate('the', max_new_tokens=2); "
        "r.chat([{'role': 'user', 'content': 'the'}], max_new_tokens=2); "
        "print('transformers' in sys.modules)"
    )
    assert run(code).strip() == "False"


def test_importing_prints_nothing_and_starts_no_gpu():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES if p.name != "__init__.py"]
    code = f"import importlib, torch\nfor m in {modules!r}: importlib.import_module(m)\n"
    assert run(code + "print(torch.cuda.is_initialized())").strip() == "False"


CALLED_IN = {  # method or op -> the only modules of the package that call it, ops aside
    "rms_norm": {"model/sublayers.py"},
    "add_rms_norm": {"model/sublayers.py"},
    "project": {"model/sublayers.py", "fitting/stream.py"},
    "leave": {"model/sublayers.py", "fitting/stream.py"},
}


def test_the_forward_pass_of_a_sublayer_is_written_once():
    """`Sublayer` and `Stream` run one; only the steps in one C++ call and of fused ops do so in their own way."""
    found: dict[str, set[str]] = {name: set() for name in CALLED_IN}
    for path in (p for p in FILES if room(p) != "ops"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in found:
                found[node.func.attr].add(str(path.relative_to(PACKAGE)))
    assert found == CALLED_IN


# Folder of csrc -> folders whose headers it may include, besides its own.
MAY_INCLUDE = {
    ".": {"cpu/simd", "cpu/step"},
    "common": set(),
    "cpu/simd": {"common"},
    "cpu/attention": {"common", "cpu/simd"},
    "cpu/panels": {"common", "cpu/simd"},
    "cpu/pointwise": {"common", "cpu/simd"},
    "cpu/codes": {"common", "cpu/simd", "cpu/pointwise"},
    "cpu/rows": {"common", "cpu/simd", "cpu/panels", "cpu/pointwise"},
    "cpu/step": {"common", "cpu/simd", "cpu/attention", "cpu/panels", "cpu/pointwise", "cpu/codes", "cpu/rows"},
    "cuda": {"common"},
}
MOST_FILES = 14
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx")
SOURCES = sorted(p for p in CSRC.rglob("*") if p.is_file())


def folder(path: Path) -> str:
    return path.relative_to(CSRC).parent.as_posix()


def included(path: Path, marks: str) -> list[str]:
    """What `path` includes in quotes, or in angle brackets."""
    before, after = marks
    return re.findall(rf"^[ \t]*#[ \t]*include[ \t]+{before}([^{after}\n]+){after}", path.read_text(), re.M)


def test_include_directions():
    for path in SOURCES:
        for name in included(path, '""'):
            assert (CSRC / name).is_file(), f"{path} includes {name}, which is not below csrc"
            other = folder(CSRC / name)
            assert other in {folder(path)} | MAY_INCLUDE[folder(path)], f"{path} must not include {name}"


def test_folders_of_sources_stay_small():
    sizes = collections.Counter(map(folder, SOURCES))
    assert {name: size for name, size in sizes.items() if size > MOST_FILES} == {}
    assert set(sizes) <= set(MAY_INCLUDE)


def reached(path: Path, seen: set[Path]) -> set[Path]:
    """`path` and every header of ours that it includes, directly or not."""
    if path not in seen:
        seen.add(path)
        for name in included(path, '""'):
            reached(CSRC / name, seen)
    return seen


@pytest.mark.parametrize("path", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda p: p.name)
def test_device_code_includes_no_torch_header(path):
    """Kernels take pointers, and compile in seconds; tensors end in the bindings."""
    files = reached(path, set())
    assert CSRC / "cuda" / "device.cuh" in files
    for file in files:
        roots = {name.split("/")[0] for name in included(file, "<>")}
        assert not roots & {"ATen", "c10", "torch", "pybind11"}, file


def test_what_is_compiled_once_a_level_says_so():
    """Code that several instruction levels include ends in .inc and has no guard, unless it opens a namespace."""
    for path in SOURCES:
        text = path.read_text()
        if path.suffix in (".h", ".cuh"):
            assert "#pragma once" in text, f"{path}: neither guarded nor .inc"
        elif path.suffix == ".inc":
            assert ("#pragma once" in text) == ("\nnamespace " in text), path


def test_instruction_levels_have_one_set_of_names():
    for path in SOURCES:
        if re.search("avx|amx|vnni|sse|neon|generic", path.stem):
            assert path.stem.endswith(LEVELS) and (path.stem in LEVELS or folder(path) == "cpu/pointwise"), path


SUBLAYER_NUMBERS = {"i", "index", "sublayer", "best", "first", "block", "b"}  # what code calls them


def halved_or_doubled(path: Path) -> list[int]:
    """Lines of `path` that take a sub-layer's or a block's number times two, half of it or modulo two."""

    def is_number(node: ast.expr) -> bool:
        if isinstance(node, ast.Subscript):
            return isinstance(node.value, ast.Attribute) and node.value.attr in ("blocks", "sources")
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name in SUBLAYER_NUMBERS

    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.FloorDiv | ast.Mult):
            pairs = [(node.left, node.right)]
            if isinstance(node.op, ast.Mult):
                pairs.append((node.right, node.left))
            found += [node.lineno for a, b in pairs if isinstance(b, ast.Constant) and b.value == 2 and is_number(a)]
    return sorted(found)


@pytest.mark.parametrize("folder", ["depthprune_runtime", "benchmarks"])
def test_only_the_spec_knows_where_a_block_lies(folder):
    """Attention is not at even numbers once a sub-layer is dropped: `DecoderSpec.whole_blocks` tells."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        assert not halved_or_doubled(path), path


def test_parity_is_found(tmp_path):
    path = tmp_path / "code.py"
    lines = ["i % 2", "2 * block + half", "edit.blocks[0] * 2", "step.sublayer // 2", "head_dim // 2", "2 * width"]
    path.write_text("\n".join(lines))
    assert halved_or_doubled(path) == [1, 2, 3, 4]
