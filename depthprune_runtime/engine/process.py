"""`Process`: notices that a model or an engine is used behind a fork of the process that it belongs to.

A fork copies memory, but none of the threads of OpenMP, of a GPU or of an `AsyncEngine`: whoever waits for them, waits
for ever.
"""

from __future__ import annotations

import os

import torch

from depthprune_runtime.errors import InputError


class Process:
    """The process that something was made in."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._id = os.getpid()

    def check(self, device: torch.device) -> None:
        """Raise InputError where the model cannot compute: in another process, unless on one CPU thread."""
        if os.getpid() != self._id and (device.type != "cpu" or torch.get_num_threads() > 1):
            remedy = ", or call torch.set_num_threads(1) in it first" if device.type == "cpu" else ""
            raise InputError(
                f"{self._what} was made in process {self._id} and is used in {os.getpid()}, forked from it, which has "
                f"none of its threads; start the process by 'spawn' and make it there{remedy}"
            )

    def check_thread(self) -> None:
        """Raise InputError where a thread of the first process is needed."""
        if os.getpid() != self._id:
            raise InputError(
                f"{self._what} was made in process {self._id} and is used in {os.getpid()}, forked from it, which does "
                "not have its thread; make one there"
            )
