"""The walk: dense teacher and pruned student side by side, sub-layer by sub-layer, over the calibration tokens.

At any time one sub-layer of each is in memory, and the hidden states of the tokens (float32; on disk above
a limit). Methods that need the student's own statistics (narrowing, repair) are visitors of this walk.

Where the student has been pruned, its sub-layer j answers for a set of the teacher's sub-layers: those
merged into it, and those dropped next to it. Its target is what the teacher's residual stream holds after
all sub-layers answered for so far:

    target_j = embedding + sum over answered i of o_i        o_i = the teacher's output of sub-layer i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting import states as token_states
from depthprune_runtime.fitting.finite import FiniteStates
from depthprune_runtime.fitting.options import Answers
from depthprune_runtime.fitting.pieces import Piece
from depthprune_runtime.fitting.states import TokenStates
from depthprune_runtime.fitting.stream import Stream, embed
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.model.sublayers import Sublayer
from depthprune_runtime.spec import DecoderSpec


class Student(Protocol):
    """A checkpoint whose sub-layer j is made of the teacher's sub-layers `pieces[j].sources`."""

    spec: DecoderSpec
    pieces: tuple[Piece, ...]

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Segment:
    """A stretch in which the teacher runs sub-layers `teacher`, in its order, and the student those in `pieces`.

    answered[k]: the teacher's sub-layers that the student's first k + 1 pieces of the segment answer for.
    """

    teacher: tuple[int, ...]
    pieces: tuple[int, ...]
    answered: tuple[frozenset[int], ...]

    def untouched(self, pieces: Sequence[Piece]) -> bool:
        """Whether the student does here just what the teacher does."""
        return len(self.teacher) == 1 and len(self.pieces) == 1 and pieces[self.pieces[0]].keep is None


def segments(pieces: Sequence[Piece], count: int, answers_for: Answers) -> list[Segment]:
    """Cut teacher (`count` sub-layers) and student (`pieces`) into segments that end at the same point.

    answers_for: whether a dropped sub-layer is answered for by the kept one before it (if any) or after it.
    """
    kept = {i for p in pieces for i in p.sources}
    found: list[Segment] = []
    begin = 0  # next teacher sub-layer
    k = 0
    while k < len(pieces):
        group = [k]  # pieces of one flatten interleave in the teacher's order, so they share a segment
        while k + 1 < len(pieces) and pieces[k + 1].sources[0] < pieces[k].sources[-1]:
            k += 1
            group.append(k)
        last = max(i for g in group for i in pieces[g].sources)
        end = last + 1
        if answers_for == "before":
            while end < count and end not in kept:
                end += 1
        if group[-1] == len(pieces) - 1:
            end = count  # whatever was dropped at the end is answered for by the last piece
        stretch = range(begin, end)
        answered: list[frozenset[int]] = []
        covered = {i for i in stretch if i not in kept and i < min(pieces[group[0]].sources)}
        for g in group:
            covered |= set(pieces[g].sources)
            answered.append(frozenset(covered if g != group[-1] else stretch))
        found.append(Segment(tuple(stretch), tuple(group), tuple(answered)))
        begin = end
        k += 1
    return found


@dataclass
class Visit:
    """One student sub-layer as a visitor meets it.

    states: the student's residual stream entering it; target: what the teacher holds at the same point; edited: whether
    it was merged or answers for dropped sub-layers.
    """

    index: int
    piece: Piece
    sublayer: Sublayer
    states: TokenStates
    target: TokenStates
    stream: Stream
    edited: bool

    def hidden(self, batch: int) -> Tensor:  # [n * S, C]
        """What one batch's input projection sees: the normalised states."""
        return self.sublayer.enter(self.states.batch(batch))

    def inner(self, batch: int) -> Tensor:  # [n * S, units * width]
        """Inner activations of one batch in the student: the heads' outputs, or psi."""
        return self.stream.inner(self.sublayer, self.states.batch(batch))


Visitor = Callable[[Visit], Sublayer]
"""Looks at a sub-layer and returns the one that the student goes on with."""


class Walk:
    """Runs teacher and student over `windows` [N, S] and calls `visitor` for every student sub-layer.

    student: the wide student (merged but not narrowed); dtype: of the sub-layers' arithmetic; answers_for: see
    `segments`; skip_equal: run the stretch before the first edit once, for teacher and student alike, and visit
    nothing there (a repair would find nothing to mend); what is quantised differs from the first sub-layer on.
    """

    def __init__(
        self,
        teacher: Checkpoint,
        student: Student,
        windows: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        answers_for: Answers = "before",
        skip_equal: bool = True,
    ) -> None:
        count, seq_len = windows.shape
        context = teacher.spec.max_position_embeddings
        if seq_len > context:
            raise InputError(f"seq_len: expected at most the model's context of {context}, got {seq_len}")
        self._windows = windows
        self._teacher = SublayerLoader(teacher.spec, teacher.tensor, device, dtype)
        self._student = SublayerLoader(student.spec, student.tensor, device, dtype)
        self._pieces = student.pieces
        self._segments = segments(student.pieces, len(teacher.spec.sublayers), answers_for)
        self._shape = (count, seq_len, teacher.spec.hidden_size)
        self._device = device
        self._teacher_stream = Stream(seq_len, device, FiniteStates(self._teacher, teacher.name))
        self._student_stream = Stream(seq_len, device, FiniteStates(self._student, teacher.name))
        self._skip_equal = skip_equal
        self._batch_tokens = token_states.batch_tokens(student.spec)
        # of states: the teacher's, the student's, and a target for every further piece of a segment
        self._buffers = 1 + max(len(s.pieces) for s in self._segments)

    @property
    def steps(self) -> int:
        """How often `advance` is called: once a segment."""
        return len(self._segments)

    def _states(self) -> TokenStates:
        limit = token_states.MEMORY_LIMIT // self._buffers
        return TokenStates.empty(*self._shape, self._device, self._batch_tokens, limit=limit)

    def _advance_teacher(self, segment: Segment, teacher: TokenStates, targets: Sequence[TokenStates]) -> None:
        """Run the segment's teacher sub-layers; targets[k] = start + outputs answered for after piece k."""
        for target in targets:
            target.copy_from(teacher)
        for i in segment.teacher:
            for b, out in enumerate(self._teacher_stream.outputs(i, self._teacher.sublayer(i), teacher)):
                for target, answered in zip(targets, segment.answered, strict=False):
                    if i in answered:
                        target.batch(b).add_(out)

    def run(self, visitor: Visitor, advance: Callable[[], None] = lambda: None) -> None:
        """Walk to the end."""
        teacher, student = self._states(), self._states()
        embed(self._teacher, self._windows, teacher)
        extra = [self._states() for _ in range(self._buffers - 2)]
        equal = self._skip_equal
        if not equal:
            embed(self._student, self._windows, student)  # its table may differ: a tied one is quantised with the head
        for segment in self._segments:
            if equal and not segment.untouched(self._pieces):
                student.copy_from(teacher)
                equal = False
            if equal:
                self._advance_teacher(segment, teacher, ())
                advance()
                continue
            targets = extra[: len(segment.pieces) - 1]
            self._advance_teacher(segment, teacher, targets)
            for k, index in enumerate(segment.pieces):
                target = targets[k] if k < len(targets) else teacher  # the last one ends where the teacher is
                sublayer = self._student.sublayer(index)
                edited = not segment.untouched(self._pieces)
                visit = Visit(index, self._pieces[index], sublayer, student, target, self._student_stream, edited)
                sublayer = visitor(visit)
                self._student_stream.advance(index, sublayer, student)
            advance()
