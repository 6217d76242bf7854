"""`heal`: a pruned file and its dense parent in, one trained file out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.checkpoint.base import TOKENIZER_FILE
from depthprune_runtime.checkpoint.outputs import as_path, check_output
from depthprune_runtime.checkpoint.shards import DEFAULT_MAX_SHARD_SIZE, parse_size
from depthprune_runtime.checkpoint.writing import write
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.healing.data import Source, Windows, packed_windows, parse_source
from depthprune_runtime.healing.options import HealOptions
from depthprune_runtime.healing.parameters import trainable
from depthprune_runtime.healing.schedule import Share, held_out, total_steps, window_order
from depthprune_runtime.healing.state import load_state
from depthprune_runtime.healing.student import Student
from depthprune_runtime.healing.targets import Cache, Targets, Teacher, example
from depthprune_runtime.healing.train import Material, Training
from depthprune_runtime.host.devices import resolve_device, resolve_dtype
from depthprune_runtime.progress import Progress
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.text.tokenizer import Tokenizer
from depthprune_runtime.texts import text_file


@dataclass(frozen=True)
class HealResult:
    """What `heal` did. trained: names of the tensors that changed; tokens: that were trained on, repeats included;
    history: step, loss and perplexity on the windows held out, the first before training."""

    path: Path
    spec: DecoderSpec
    trained: tuple[str, ...]
    steps: int
    tokens: int
    history: tuple[Mapping[str, float], ...]


class HealedCheckpoint(Checkpoint):
    """`parent` with the tensors that training changed; everything else, its plan included, is the parent's.

    changed: by name, in float32; healing: what was done, for the provenance.
    """

    def __init__(self, parent: Checkpoint, changed: Mapping[str, Tensor], healing: Mapping[str, Any]) -> None:
        self.name = f"{parent.name} healed"
        self.spec, self.dtype, self.plan = parent.spec, parent.dtype, parent.plan
        self.source_files = parent.source_files
        self.provenance = {**parent.provenance, "healing": [*parent.provenance.get("healing", ()), dict(healing)]}
        self._parent = parent
        self._changed = changed

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._parent.assets

    def stored_checksum(self, entry: str) -> str | None:
        return None if entry in self._changed else self._parent.stored_checksum(entry)

    def check_unchanged(self) -> None:
        self._parent.check_unchanged()

    def tensor(self, name: str) -> Tensor:
        changed = self._changed.get(name)
        return self._parent.tensor(name) if changed is None else changed.to(self.dtype)


def first_trained(student: Checkpoint, teacher: Checkpoint) -> int:
    """Number of the first sub-layer that is not the teacher's own. Raises InputError where there is none."""
    ours, theirs = student.checksums(), teacher.checksums()
    if ours["embed_tokens.weight"] != theirs["embed_tokens.weight"]:
        raise InputError(f"{student.name}: its embedding is not that of {teacher.name}; give its dense parent")
    for i, (own, dense) in enumerate(zip(student.spec.sublayers, teacher.spec.sublayers, strict=False)):
        if own != dense or any(ours[name] != theirs[name] for name in student.spec.sublayer_shapes(i)):
            return i
    if len(student.spec.sublayers) == len(teacher.spec.sublayers):
        raise InputError(f"{student.name}: nothing to heal: it does not differ from {teacher.name}")
    return len(student.spec.sublayers) - 1  # the end of the model is gone: the last that stays answers for it


def _parents(student: Checkpoint) -> list[str]:
    """Digests of the models that plans were made for, the last plan's first."""
    plans = [student.plan, *reversed(student.provenance.get("plans", ()))]
    return [str(plan["parent_digest"]) for plan in plans if plan is not None]


def check_pair(student: Checkpoint, teacher: Checkpoint) -> str:
    """The teacher's digest, after all checks that `student` can learn from it. Raises InputError in one line."""
    if student.plan is None:
        raise InputError(f"{student.name}: expected a pruned file, got a dense model without a plan; prune it first")
    if student.quantization:
        raise InputError(f"{student.name}: expected weights that are not quantised; heal first, then quantise")
    if beyond := student.spec.beyond_llama():
        raise InputError(f"{student.name}: healing computes no {', '.join(sorted(beyond))} yet")
    ours, theirs = student.spec.vocab_size, teacher.spec.vocab_size
    if ours != theirs:
        raise InputError(
            f"teacher {teacher.name}: expected the same vocabulary of {ours:,} tokens, got {theirs:,}; "
            f"give the dense parent of {student.name}"
        )
    if student.assets.get(TOKENIZER_FILE) != teacher.assets.get(TOKENIZER_FILE):
        raise InputError(
            f"teacher {teacher.name}: its tokenizer is not that of {student.name}; give the dense parent of the latter"
        )
    digest = teacher.digest()
    if digest not in _parents(student):
        raise InputError(
            f"teacher {teacher.name}: expected the model that {student.name} was pruned from, of digest "
            f"{printable(_parents(student)[0], 16)}, got {printable(digest, 16)}; give its dense parent"
        )
    return digest


def _compute_dtype(dtype: str | torch.dtype | None, student: Checkpoint) -> torch.dtype:
    wanted = resolve_dtype(dtype)
    if wanted is None:
        return torch.float32 if student.dtype == torch.float16 else student.dtype
    if wanted == torch.float16:
        raise InputError("dtype: expected bf16 or fp32, got fp16, in which gradients vanish")
    return wanted


def _shares(windows: Windows, apart: Tensor) -> list[Share]:
    """The windows of each text that are trained on."""
    kept_apart, first, found = set(apart.tolist()), 0, []
    for count, source in zip(windows.counts, windows.sources, strict=True):
        numbers = tuple(n for n in range(first, first + count) if n not in kept_apart)
        found.append(Share(numbers, float(source.weight)))
        first += count
    return found


@contextmanager
def _work_folder(folder: Path, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The folder of a run, which goes with the end of a run that ends well."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"work {folder}: expected a folder or a new name")
    if folder.exists() and not resume:
        if not overwrite:
            raise InputError(f"work {folder}: an earlier run is there; go on with --resume, or begin anew with --force")
        _remove(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"work {folder}: cannot be made: {error.strerror}") from error
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    if folder.exists():
        _remove(folder)


_STATE, _CACHE = "state.pt", "targets.bin"


def _remove(folder: Path) -> None:
    """Remove what a run keeps in `folder`, and the folder if nothing else is in it."""
    for name in (_STATE, _CACHE):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def heal(
    model: str | Path,
    output: str | Path,
    *,
    teacher: str | Path,
    data: Sequence[str | Source] = ("wikitext2",),
    options: HealOptions | None = None,
    resume: bool = False,
    work: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> HealResult:
    """Train what lies behind the first edit of pruned `model` by distillation, and write one file to `output`.

    Args:
        model: a pruned file of our own.
        output: the file to write.
        teacher: the dense model that it was pruned from, in any format.
        data: texts to train on: names, UTF-8 files or JSON lines, each as `FILE[:weight]` or `Source`.
        options: how; by default the preset `paper`.
        resume: go on with a run that was interrupted. It ends with the same bits as one that was not.
        work: folder for the state of the run and the teacher's answers; by default `output` with `.heal` behind it.
        device: `auto` is CUDA where there is one.
        dtype: to compute in, `bf16` or `fp32`; by default the file's. What is trained is float32.
        max_shard_size: as in `prune`.
        overwrite: let `output` replace a file, and the run another one's state.
        progress: bars on stderr; by default none.

    Returns:
        What was trained, and the loss on the windows held out, from before training to the end.

    Raises:
        InputError: where model, teacher, texts or options will not do. No partial file is left.
    """
    options, progress = options or HealOptions(), progress or Progress()
    path = as_path(output, "output")
    max_shard_size = parse_size(max_shard_size)
    folder = as_path(work, "work") if work is not None else path.with_name(f"{path.name}.heal")
    sources = [parse_source(text) if isinstance(text, str) else text for text in data]
    target, student = resolve_device(device), open_checkpoint(model)
    compute = _compute_dtype(dtype, student)
    dense = open_checkpoint(teacher, student.dtype)
    texts = [file for source in sources for file in text_file(source.text)]
    check_output(path, (*student.source_files, *dense.source_files, *texts), overwrite)
    digest = check_pair(student, dense)
    start = first_trained(student, dense)
    if options.seq_len > student.spec.max_position_embeddings:
        raise InputError(
            f"seq_len: expected at most the model's context of {student.spec.max_position_embeddings}, "
            f"got {options.seq_len}"
        )
    windows = packed_windows(sources, Tokenizer(student), options.seq_len, student.spec.vocab_size)
    apart = held_out(windows.ids.shape[0], options)
    shares = _shares(windows, apart)
    steps = total_steps(shares, options)
    settings = {
        "teacher_digest": digest,
        "first_sublayer": start,
        "steps": steps,
        "tokens": steps * options.batch * options.seq_len,
        "data": list(windows.description),
        "dtype": str(compute).removeprefix("torch."),
        **{name: value for name, value in asdict(options).items() if name not in ("eval_every", "save_every", "cache")},
    }
    key = {**settings, "student_digest": student.digest(), "eval_every": options.eval_every, "device": target.type}
    with _work_folder(folder, resume, overwrite) as place:
        state = load_state(place / _STATE, key)
        needed = sorted({*apart.tolist(), *islice(window_order(shares, options.seed), steps * options.batch)})
        targets = _targets(dense, start, target, windows.ids, needed, options, place, key, progress)
        parameters = trainable(student.spec, start, student.tensor, target, compute, options)
        head = student.tensor(student.spec.head_name).to(target, compute)
        material = Material(windows.ids, targets, shares, apart.tolist(), head)
        runner = Student(student.spec, start, parameters, target, options.recompute)
        training = Training(runner, parameters, material, options, steps, target, key, place / _STATE)
        if state is not None:
            training.resume(state)
        with progress.reported("heal", steps, training.done) as report:
            training.run(report)
        changed = parameters.merged()
        healed = HealedCheckpoint(student, changed, {**settings, "held_out_history": training.history})
        write(healed, path, progress, max_shard_size, overwrite)
    return HealResult(path, student.spec, tuple(changed), steps, int(settings["tokens"]), tuple(training.history))


def _targets(
    dense: Checkpoint,
    start: int,
    device: torch.device,
    windows: Tensor,
    needed: Sequence[int],
    options: HealOptions,
    folder: Path,
    key: Mapping[str, Any],
    progress: Progress,
) -> Targets:
    """Targets of the windows `needed`; with a cache all of them are in it afterwards."""
    wanted = options.hidden_weight > 0
    teacher = Teacher(dense, start, device, options.top_k, wanted)
    if not options.cache:
        return Targets(windows, teacher, None)
    top_k = min(options.top_k, dense.spec.vocab_size)
    like = example(dense.spec.hidden_size, options.seq_len, top_k, dense.dtype, wanted)
    if not (folder / _CACHE).exists():
        Cache.check_room(folder, len(needed), like)
    targets = Targets(windows, teacher, Cache(folder / _CACHE, windows.shape[0], like, key))
    with progress.stage("run the teacher", len(needed)) as advance:
        for number in needed:
            targets[number]
            advance()
    targets.all_cached()
    return targets
