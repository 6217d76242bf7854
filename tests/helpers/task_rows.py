"""Rows of evaluation tasks, and their files."""

from __future__ import annotations

import json

ROWS = [
    {"context": "the quick brown", "choices": ["fox", "decoder"], "gold": 0},
    {"context": "a decoder is a sequence of", "choices": ["lazy dogs", "residual sub-layers", "emoji"], "gold": 1},
    {"context": "prune the blocks that change ", "choices": [" most", "the hidden state least", "a"], "gold": 2},
    {"context": "", "choices": ["naïve", "façade — 東京"], "gold": 1},
]
SCHEMAS = [
    {"contexts": ["the fox is quick, the fox", "the fox is quick, the dog"], "continuation": "jumps over.", "gold": 0},
    {"contexts": ["the dog is lazy, the fox", "the dog is lazy, the dog"], "continuation": "sleeps", "gold": 1},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
