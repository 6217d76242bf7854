"""A model behind a fork: one line instead of waiting for threads that are not there."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import asyncio, os, sys
import torch
from depthprune_runtime import AsyncEngine, InputError, Runtime, SamplingParams

torch.set_num_threads(2)
runtime = Runtime.load({path!r}, device="cpu")
params = SamplingParams(temperature=0, max_tokens=3)
expected = runtime.generate([5, 6, 7], params)[0].outputs[0].token_ids
torch.ones(1 << 20).exp().sum()  # starts the threads of OpenMP
engine = runtime.engine(kv_memory="1MiB")
engine.add_request([5], params)
owner = AsyncEngine(runtime.engine(kv_memory="1MiB"))
asyncio.run(owner.stats())

async def consume():
    async for _ in owner.generate([5], params):
        pass

calls = {{
    "generate": lambda: runtime.generate([5, 6, 7], params),
    "stream": lambda: list(runtime.stream([5, 6, 7], params)),
    "logits": lambda: runtime.logits([5]),
    "engine": lambda: runtime.engine(),
    "step": engine.step,
    "async": lambda: asyncio.run(consume()),
    "stats": lambda: asyncio.run(owner.stats()),
    "close": owner.shutdown,
}}
child = os.fork()
if child == 0:
    for name, call in calls.items():
        try:
            call()
            print(name, "did not notice", flush=True)
        except InputError as error:
            print(name, "|", error, flush=True)
    torch.set_num_threads(1)
    print("alone", runtime.generate([5, 6, 7], params)[0].outputs[0].token_ids == expected, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", runtime.generate([5, 6, 7], params)[0].outputs[0].token_ids == expected, flush=True)
owner.shutdown()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_child_is_told_and_the_parent_goes_on(pico_file):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(path=str(pico_file))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert (lines.pop("alone"), lines.pop("parent")) == ("True", "True")
    assert set(lines) == {"generate", "stream", "logits", "engine", "step", "async", "stats", "close"}
    for name, text in lines.items():
        assert "forked from it" in text, (name, text)
