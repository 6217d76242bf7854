"""Formats by name, their originals, and running mutants of them."""

from __future__ import annotations

import gc
import importlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzz.folder_mutants import folder_mutant
from fuzz.gguf_mutants import gguf_mutant
from fuzz.mutation import Mutant
from fuzz.native_mutants import EXTRAS, native_mutant
from fuzz.originals import Original, build
from fuzz.request_mutants import request_mutant
from fuzz.sandbox import Report, run_child, run_children
from fuzz.state_mutants import other_mutant, state_mutant
from fuzz.uses import Observation, use_model, use_other, use_request, use_state, warm_parser
from fuzz.verdicts import Verdict, judge

# format -> (its mutator, share of a campaign)
FORMATS: dict[str, tuple[Callable[..., Mutant], float]] = {
    "native": (native_mutant, 0.22),
    "shards": (native_mutant, 0.10),
    "quantized": (native_mutant, 0.08),
    "huggingface": (folder_mutant, 0.20),
    "gguf": (gguf_mutant, 0.18),
    "state": (state_mutant, 0.05),
    "requests": (request_mutant, 0.14),
    "other": (other_mutant, 0.03),
}


@dataclass(frozen=True)
class Result:
    """A mutant's verdict, in what can cross to another process.

    behind: what it did behind other mutants in one child and does not do alone, or "".
    """

    format: str
    seed: int
    mutant: str
    verdict: Verdict
    seconds: float
    behind: str = ""


class Bench:
    """A warm process that runs mutants in children. `close` removes its files."""

    def __init__(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.environ["HF_HUB_OFFLINE"] = "1"
        memory = Path("/dev/shm")
        place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=place))
        self._runtimes: dict[str, Any] = {}
        self.originals: dict[str, list[Original]] = {}

    def move(self) -> None:
        """To be called in a fork of this process: files go to a folder of its own, which the bench that was forked
        removes."""
        self._folder = Path(tempfile.mkdtemp(prefix="worker-", dir=self._folder))

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def prepare(self) -> None:
        """Build the originals and see what each gives unchanged."""
        import pico  # noqa: F401  # with Transformers, which children would each import
        import torch

        torch.set_num_threads(1)
        warm_parser()
        made = run_child(lambda: build(self._fresh()))
        if made.end != "done":
            raise RuntimeError(f"the originals cannot be built: {made.error or made.printed}")
        for original in made.value:
            self.originals.setdefault(original.format, []).append(original)
        for original in made.value:
            original.baseline = self._unchanged(original)
        for original in self.originals["requests"]:
            self._load(original)
        for original in (self.originals["native"][0], self.originals["gguf"][0]):
            for extra in dict.fromkeys(EXTRAS):
                self._warm(replace(self._plain(original), extra=extra))
        gc.collect()
        gc.freeze()

    @staticmethod
    def _plain(original: Original) -> Mutant:
        """A mutant without a mutation."""
        if original.format == "requests":
            plain = {"kind": "engine", "prompt": [5, 6], "params": {"max_tokens": 2}, "request": {}}
            return Mutant(original.format, -1, original.name, (), payload=plain)
        return Mutant(original.format, -1, original.name, (), original.files, original.target)

    def _unchanged(self, original: Original) -> Observation:
        """What `original` gives."""
        report = self._warm(self._plain(original))
        seen: Observation = report.value
        if report.end != "done" or seen.refused or seen.complaints or not seen.results:
            raise RuntimeError(f"{original.format} {original.name}: unchanged it gives {report}")
        return seen

    def _warm(self, mutant: Mutant) -> Report:
        """Run `mutant` and import here what its child had to import, so that no other child reads it again."""
        report = self.run(mutant, modules=True)
        if report.end != "done":
            return report
        report.value, modules = report.value
        for name in modules:
            if name not in sys.modules and name.split(".")[0] not in ("__main__", "__mp_main__", "triton"):
                try:
                    importlib.import_module(name)
                except Exception:  # made by their packages on the way, not by import
                    continue
        return report

    def _fresh(self, name: str = "work") -> Path:
        """An empty folder."""
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _load(self, original: Original) -> Any:
        """Its runtime, loaded once here, on one thread; children inherit it."""
        from depthprune_runtime import Runtime

        if original.name not in self._runtimes:
            path = self._fresh() / original.target
            path.write_bytes(original.files[original.target])
            self._runtimes[original.name] = Runtime.load(path, device="cpu")
        return self._runtimes[original.name]

    def original(self, mutant: Mutant) -> Original:
        return next(o for o in self.originals[mutant.format] if o.name == mutant.original)

    def mutant(self, format: str, seed: int) -> Mutant:
        """Mutant number `seed` of `format`."""
        original = random.Random(f"{format} {seed}").choice(self.originals[format])
        maker, _ = FORMATS[format]
        return maker(format, seed, original.name, original.files)

    def run(self, mutant: Mutant, modules: bool = False) -> Report:
        """What becomes of a child that uses `mutant`; modules: its value comes with the names of all modules."""
        work = self._work(mutant, self._fresh())
        return run_child((lambda: (work(), sorted(sys.modules))) if modules else work)

    def _work(self, mutant: Mutant, folder: Path) -> Callable[[], Observation]:
        """Its files, written in `folder`; what the child is to do with them."""
        original = self.original(mutant)
        if mutant.format == "requests":
            runtime = self._load(original)
            return lambda: use_request(runtime, mutant.payload)
        place = folder / "model"
        place.mkdir()
        for name, data in mutant.files.items():
            (place / name).write_bytes(data)
        for name, data in original.beside.items():
            (folder / name).write_bytes(data)
        path = place if mutant.target == "." else place / mutant.target
        uses: dict[str, Callable[[], Observation]] = {
            "state": lambda: use_state(path, folder, original.name == "fast"),
            "other": lambda: use_other(path, folder),
        }
        return uses.get(mutant.format, lambda: use_model(path, folder, mutant.extra, mutant.chats))

    def results(self, jobs: Iterable[tuple[str, int]]) -> list[Result]:
        """Verdicts on mutants, (format, seed) each.

        As many as possible share a child, as a fork costs more than a mutant. Where one verdict is not good, nothing
        that this child did counts: its mutants run again, each in a child of its own.
        """
        mutants = [self.mutant(*job) for job in jobs]
        results: list[Result] = []
        while len(results) < len(mutants):
            rest = mutants[len(results) :]
            folder = self._fresh()
            works = [self._work(mutant, self._fresh(f"{folder.name}/{i}")) for i, mutant in enumerate(rest)]
            shared = [self._judged(*pair) for pair in zip(rest, run_children(works), strict=False)]
            if not all(r.verdict.good for r in shared):
                shared = [self._alone(*pair) for pair in zip(rest, shared, strict=False)]
            results += shared
        return results

    def _judged(self, mutant: Mutant, report: Report) -> Result:
        verdict = judge(report, mutant, self.original(mutant))
        return Result(mutant.format, mutant.seed, str(mutant), verdict, report.seconds)

    def _alone(self, mutant: Mutant, shared: Result) -> Result:
        """Its verdict in a child of its own; shared: the one behind others."""
        result = self._judged(mutant, self.run(mutant))
        if result.verdict.good and not shared.verdict.good:
            return replace(result, behind=f"{shared.verdict.outcome}: {shared.verdict.why}")
        return result


def schedule(mutants: int, start: int = 0, formats: list[str] | None = None) -> Iterator[tuple[str, int]]:
    """(format, seed) of `mutants` in one endless sequence, from number `start`; formats in turn by their shares."""
    chosen = {name: share for name, (_, share) in FORMATS.items() if formats is None or name in formats}
    whole = sum(chosen.values())
    done = dict.fromkeys(chosen, 0)
    for number in range(1, start + mutants + 1):
        name = max(chosen, key=lambda n: chosen[n] / whole * number - done[n])
        if number > start:
            yield name, done[name]
        done[name] += 1
