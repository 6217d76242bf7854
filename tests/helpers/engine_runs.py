"""Architectures and requests for tests of the engine, and stepping it to its end."""

from __future__ import annotations

import dataclasses

from specs import mixed_spec, plain_spec

from depthprune_runtime import SamplingParams

SPECS = {
    "plain": plain_spec(2),
    "mixed widths": mixed_spec(),
    "sliding window": mixed_spec(window=5),
    "attention only": mixed_spec(kinds="aaa"),
    "FFN only": mixed_spec(kinds="fF"),
}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=3)
KINDS = (
    GREEDY,
    SAMPLED,
    dataclasses.replace(SAMPLED, top_k=7, top_p=0.9, seed=4),
    dataclasses.replace(GREEDY, repetition_penalty=1.7),
    dataclasses.replace(SAMPLED, repetition_penalty=1.3, min_p=0.02, logprobs=2),
)


def run(e, results=None) -> dict:
    """Step to the end; request id -> (joined deltas of each output, result)."""
    results = {} if results is None else results
    for _ in range(5000):
        if not e.has_unfinished():
            e.check()
            return results
        collect(e, results)
    raise AssertionError("it does not end")


def collect(e, results) -> None:
    for delta in e.step():
        ids, _ = results.setdefault(delta.request_id, ({}, None))
        ids[delta.output_index] = ids.get(delta.output_index, ()) + delta.token_ids
        results[delta.request_id] = (ids, delta.result)
    e.check()
