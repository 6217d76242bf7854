"""Names of methods and scores, without importing torch: the command line shows them in its help."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["shortgpt"]
Score = Literal["block-influence", "relative-magnitude", "sequential", "reverse"]

METHODS: tuple[Method, ...] = get_args(Method)
SCORES: tuple[Score, ...] = get_args(Score)
