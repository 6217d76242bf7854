"""Calibration windows from a named text or a file, with the model's own tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.calibration import CalibrationSet, calibration_set
from depthprune_runtime.texts import load_text
from depthprune_runtime.tokenizer import Tokenizer


class Calibrator:
    """Calibration windows of one text for several purposes.

    text: a name or a file, see `texts.load_text`; samples, seq_len: override what a purpose asks for; seed: of the
    draw, None: the text's first windows.
    """

    def __init__(
        self, checkpoint: Checkpoint, text: str, samples: int | None, seq_len: int | None, seed: int | None
    ) -> None:
        contents = load_text(text)
        tokenizer = Tokenizer(checkpoint)
        self._name = text if "/" not in text else Path(text).name
        self._text = contents
        # windows are cut from the middle of the text, so no BOS: only the first would have one
        self._ids = tokenizer.encode(contents, add_special_tokens=False)
        self._samples, self._seq_len, self._seed = samples, seq_len, seed
        self._context = checkpoint.spec.max_position_embeddings

    def windows(self, samples: int, seq_len: int, at_most: bool = False) -> CalibrationSet:
        """`samples` windows of `seq_len` tokens unless the caller chose other numbers; at_most: fewer (but at least
        an eighth) if the text has no more."""
        if self._seq_len is not None and self._seq_len > self._context:
            raise InputError(f"seq_len: expected at most the model's context of {self._context}, got {self._seq_len}")
        samples = samples if self._samples is None else self._samples
        seq_len = min(seq_len, self._context) if self._seq_len is None else self._seq_len
        if at_most and self._samples is None:
            samples = max(min(samples, len(self._ids) // seq_len), math.ceil(samples / 8))
        return calibration_set(self._name, self._text, lambda _: self._ids, samples, seq_len, self._seed)
