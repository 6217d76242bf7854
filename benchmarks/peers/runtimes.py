"""Runtimes of bench_cpu.py: where their Python is, and the files each needs of a model, made once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers import weights
from peers.weights import Model

from depthprune_runtime.checkpoint import NativeCheckpoint
from depthprune_runtime.checkpoint.container import read_header

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PRECISIONS = {"bf16": 16, "int8": 8, "int4": 4}
GROUP_SIZE = 64  # of our quantised weights; divides every width of both models
_LLAMA_TYPES = {"int8": "q8_0", "int4": "q4_0"}
# runtime -> script, virtual environment (None: this one), precisions
RUNTIMES: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "ours": ("run_ours.py", None, tuple(PRECISIONS)),
    "transformers": ("run_transformers.py", None, ("bf16",)),
    "llama.cpp": ("run_llama_cpp.py", "llama_cpp", tuple(PRECISIONS)),
    "openvino": ("run_openvino.py", "openvino", tuple(PRECISIONS)),
    "vllm": ("run_vllm.py", "vllm", ("bf16",)),
}


class SkippedError(Exception):
    """A runtime cannot take part; the message says why, in one line."""


@dataclass(frozen=True)
class Candidate:
    """One process to measure. weight_bytes: read by a decode step; kv_bytes: by a token of context."""

    runtime: str
    variant: str
    path: Path
    weight_bytes: int
    kv_bytes: int

    @property
    def label(self) -> str:
        return self.runtime if self.variant == "dense" else f"{self.runtime} {self.variant}"


class Files:
    """Models of one `Model` under `folder`. peers: folder of the virtual environments."""

    def __init__(self, model: Model, folder: Path, gguf: Path | None, peers: Path) -> None:
        self._model, self._gguf, self._peers = model, gguf, peers
        self._folder = folder / model.name
        self._folder.mkdir(parents=True, exist_ok=True)
        self.dense = self._made("dense-bf16.safetensors", lambda p: weights.write_dense(model, gguf, p))
        self.spec = NativeCheckpoint(self.dense, verify=False).spec

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """File or folder `name`; complete or not there, also after an interruption."""
        path = self._folder / name
        if not path.exists():
            print(f"making {path.relative_to(self._folder.parent)}", file=sys.stderr, flush=True)
            partial = self._folder / f"partial-{name}"
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
            make(partial)
            partial.rename(path)
        return path

    def discard(self) -> None:
        """Delete all but the files from which others are made."""
        for path in self._folder.iterdir():
            if path.is_dir() and path.name != "huggingface":
                shutil.rmtree(path)
            elif path.is_file() and path.name not in (self.dense.name, "bf16.gguf"):
                path.unlink()

    def python(self, runtime: str) -> str:
        """Interpreter of `runtime`."""
        venv = RUNTIMES[runtime][1]
        if venv is None:
            return sys.executable
        python = self._peers / venv / "bin" / "python"
        if not python.exists():
            raise SkippedError(f"no {python}; make peers installs it")
        return str(python.absolute())

    def command(self, runtime: str) -> list[str]:
        return [self.python(runtime), str(HERE / RUNTIMES[runtime][0])]

    def environment(self, runtime: str, threads: int) -> dict[str, str]:
        """Of a worker: this working tree for ours, no path of ours for those of other environments."""
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        kept |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
        venv = RUNTIMES[runtime][1]
        if venv is None:
            kept["PYTHONPATH"] = str(ROOT)
        if runtime == "vllm":  # as its installation guide says for CPUs; it comes with this library
            openmp = (self._peers / str(venv) / "lib" / "libiomp5.so").absolute()
            if not openmp.exists():
                raise SkippedError(f"no {openmp}")
            kept |= {"LD_PRELOAD": str(openmp), "VLLM_CACHE_ROOT": str(self._folder.parent.absolute() / "vllm")}
        return kept

    def candidate(self, runtime: str, variant: str, precision: str) -> Candidate:
        """Files of one process; raises SkippedError."""
        command = self.command(runtime)
        self.environment(runtime, 1)  # raises where a library of it is missing
        kv = self.spec.kv_bytes_per_token(2)
        if runtime == "ours":
            path = self._ours(variant, precision)
            kv = NativeCheckpoint(path, verify=False).spec.kv_bytes_per_token(2)
            return Candidate(runtime, variant, path, self._tensor_bytes(path, "embed_tokens."), kv)
        if runtime == "llama.cpp":
            path = self._llama_cpp(command, precision)
            return Candidate(runtime, variant, path, _gguf_bytes(path), kv)
        folder = self._made("huggingface", lambda p: weights.write_huggingface(self.dense, p))
        if runtime == "openvino":
            export = [*command, "export", str(folder)]
            path = self._made(f"openvino-{precision}", lambda p: _run([*export, str(p), precision], runtime))
            return Candidate(runtime, variant, path, self._openvino_bytes(path, precision), kv // 2)  # its cache is u8
        size = self._tensor_bytes(folder / "model.safetensors", "model.embed_tokens.")
        return Candidate(runtime, variant, folder, size, kv)

    def _ours(self, variant: str, precision: str) -> Path:
        name = variant.replace(" ", "-").replace("%", "")

        def bf16() -> Path:
            def write(path: Path) -> None:
                weights.write_pruned(self._model, self.dense, variant, path)

            return self.dense if variant == "dense" else self._made(f"{name}-bf16.safetensors", write)

        def quantized(path: Path) -> None:
            kept = (self._folder / f"{name}-bf16.safetensors").exists()
            _quantize(bf16(), path, PRECISIONS[precision])
            if not kept:
                bf16().unlink()

        return bf16() if precision == "bf16" else self._made(f"{name}-{precision}.safetensors", quantized)

    def _llama_cpp(self, command: list[str], precision: str) -> Path:
        path = self._made("bf16.gguf", lambda p: weights.write_gguf(self.dense, p))
        if precision == "bf16":
            return path
        kind = _LLAMA_TYPES[precision]
        return self._made(f"{kind}.gguf", lambda p: _run([*command, "quantize", str(path), str(p), kind], "llama.cpp"))

    def _tensor_bytes(self, path: Path, embedding: str) -> int:
        """All weights of a safetensors file but an input embedding of its own."""
        entries = {k: v["data_offsets"] for k, v in read_header(path).items() if k != "__metadata__"}
        skipped = ("assets.",) if self.spec.tie_word_embeddings else ("assets.", embedding)
        return sum(end - start for name, (start, end) in entries.items() if not name.startswith(skipped))

    def _openvino_bytes(self, folder: Path, precision: str) -> int:
        embedding = 0
        if not self.spec.tie_word_embeddings:  # int8 where weights are int4, too
            embedding = self.spec.vocab_size * self.spec.hidden_size * (2 if precision == "bf16" else 1)
        return (folder / "openvino_model.bin").stat().st_size - embedding


def _gguf_bytes(path: Path) -> int:
    import gguf

    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _quantize(source: Path, target: Path, bits: int) -> None:
    try:
        from depthprune_runtime import quantize
    except ImportError:
        raise SkippedError("this depthprune_runtime has no quantize()") from None
    quantize(source, target, bits=bits, group_size=GROUP_SIZE, method="rtn")


def _run(command: list[str], runtime: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SkippedError(f"{runtime} cannot convert the model: {last[:300]}")
