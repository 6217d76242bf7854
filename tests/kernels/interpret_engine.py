"""A whole engine on the Triton kernels, interpreted on the CPU: prefill, and decode through the device-side loop.

Every launcher becomes the CPU implementation of its op in this process, after the expected tokens were computed
without them. Run by test_interpret.py with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import warnings

import pytest
import random_decoder
from interpreter import allow_loop_bounds
from specs import mixed_spec, plain_spec

from depthprune_runtime import SamplingParams
from depthprune_runtime.engine import runner
from depthprune_runtime.engine.gpu_graphs import GpuGraphs
from depthprune_runtime.ops import implementations
from depthprune_runtime.ops._library import bind
from depthprune_runtime.ops._triton import LAUNCHERS, implementation
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec

allow_loop_bounds()
GREEDY = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)
PROMPTS = [(3,), (5, 9, 2, 7, 11, 1, 8), tuple(range(2, 15))]


def qk_norm_spec() -> DecoderSpec:
    sublayers = [s for b in range(2) for s in (AttentionSpec(3, 1, 8, (b,), qk_norm=True), FFNSpec(40, (b,)))]
    return DecoderSpec(32, 64, 128, 1e-5, RopeSpec(), True, tuple(sublayers))


SPECS = {"plain": plain_spec(2), "mixed, window": mixed_spec(window=6), "q/k-norm": qk_norm_spec()}
EXPECTED = {name: [random_decoder.solo(spec, p, GREEDY) for p in PROMPTS] for name, spec in SPECS.items()}


@pytest.fixture(scope="module", autouse=True)
def launchers_serve_the_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the C++ kernels are overridden, which is the purpose
        for name in LAUNCHERS:
            bind(name, implementation(name), "CPU")


@pytest.mark.parametrize("name", SPECS)
def test_generation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "choose_path", GpuGraphs)
    engine = random_decoder.engine(SPECS[name], kv_blocks=64, max_num_batched_tokens=8, max_num_seqs=4)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(list(prompt), GREEDY, request_id=str(i))
    found: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert [tuple(found[str(i)]) for i in range(len(PROMPTS))] == EXPECTED[name]
    assert all(implementations(op)["CPU"] == "native" for op in LAUNCHERS)
