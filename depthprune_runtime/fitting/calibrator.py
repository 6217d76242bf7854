"""Calibration windows from a named text or a file, with the model's own tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet, calibration_set
from depthprune_runtime.options import check_count
from depthprune_runtime.text.tokenizer import Tokenizer
from depthprune_runtime.texts import known_ids, load_text


class Calibrator:
    """Calibration windows of one text for several purposes.

    text: a name or a file, see `texts.load_text`; samples, seq_len: override what a purpose asks for; seed: of the
    draw, None: the text's first windows.
    """

    def __init__(
        self, checkpoint: Checkpoint, text: str, samples: int | None, seq_len: int | None, seed: int | None
    ) -> None:
        self._context = checkpoint.spec.max_position_embeddings
        self._samples = _check_count("samples", samples)
        self._seq_len = self._check_seq_len(seq_len)
        self._seed = seed
        contents = load_text(text)
        tokenizer = Tokenizer(checkpoint)
        self._name = text if "/" not in text else Path(text).name
        self._text = contents
        # windows are cut from the middle of the text, so no BOS: only the first would have one
        ids = tokenizer.encode(contents, add_special_tokens=False)
        self._ids = known_ids(ids, checkpoint.spec.vocab_size, checkpoint.name)

    def _check_seq_len(self, seq_len: int | None) -> int | None:
        if (_check_count("seq_len", seq_len) or 0) > self._context:
            raise InputError(f"seq_len: expected at most the model's context of {self._context}, got {seq_len}")
        return seq_len

    def windows(
        self,
        samples: int,
        seq_len: int,
        at_most: bool = False,
        own: tuple[int | None, int | None] = (None, None),
    ) -> CalibrationSet:
        """`samples` windows of `seq_len` tokens unless the caller chose other numbers.

        Args:
            samples, seq_len: what suits the purpose.
            at_most: fewer windows (but at least an eighth) if the text has no more, unless the caller chose a number.
            own: samples and seq_len that the caller chose for this purpose alone; they go before those for all.
        """
        chosen = self._samples if own[0] is None else _check_count("samples", own[0])
        length = self._seq_len if own[1] is None else self._check_seq_len(own[1])
        seq_len = min(seq_len, self._context) if length is None else length
        if chosen is not None:
            samples = chosen
        elif at_most:
            samples = max(min(samples, len(self._ids) // seq_len), math.ceil(samples / 8))
        return calibration_set(self._name, self._text, lambda _: self._ids, samples, seq_len, self._seed)


def _check_count(name: str, value: int | None) -> int | None:
    if value is not None:
        check_count(name, value)
    return value
