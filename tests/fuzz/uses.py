"""What is done with a mutant, in the child: open, describe, load, generate, and for some the longer jobs.

A use returns an `Observation`: results by name, which are compared with those of the original.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.originals import IDS, MESSAGES, TEXT

REQUEST_KINDS = ("generate", "stream", "chat", "logits", "engine")
MAX_TOKENS = 6


@dataclass
class Observation:
    """results: name -> what came out, in words or digests; refused: (stage, message) of the first refusal; shown: texts
    for people, which must be clean; complaints: broken promises found on the way."""

    results: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, str] | None = None
    shown: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()[:16]


def _command(*arguments: str) -> tuple[int, str, str]:
    """The command line in this process: status, stdout, stderr."""
    from depthprune_runtime import cli

    main, parser = cli.main, warm_parser()
    cli.build_parser = lambda: parser  # made once: it costs more than the command
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


@functools.cache
def warm_parser() -> Any:
    from depthprune_runtime.cli import build_parser

    return build_parser()


def _completion(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    return {"ids": list(first.token_ids), "text": first.text, "end": str(first.finish_reason)}


def _use_runtime(runtime: Any, seen: Observation, chats: bool) -> None:
    from depthprune_runtime import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    seen.results["spec"] = hashlib.sha256(json.dumps(runtime.spec.to_json(), sort_keys=True).encode()).hexdigest()[:16]
    seen.results["defaults"] = repr(runtime.default_sampling_params)
    seen.results["logits"] = digest(runtime.logits(list(IDS)))
    seen.results["ids"] = _completion(runtime.generate(list(IDS), greedy)[0])
    seen.results["tokenizer"] = runtime.tokenizer is not None
    if runtime.tokenizer is None:
        return
    output = runtime.generate(TEXT, greedy)[0]
    seen.results["text"] = {"prompt": list(output.prompt_token_ids), **_completion(output)}
    if chats and runtime.tokenizer.chat_template is not None:
        output = runtime.chat(MESSAGES, greedy)
        seen.results["chat"] = {"prompt": output.prompt, **_completion(output)}


def _extra(kind: str, path: Path, folder: Path, runtime: Any, seen: Observation) -> None:
    """A longer job over the model; its file must open and, where that is promised, compute the same."""
    from depthprune_runtime import Runtime, import_model, prune, quantize

    out = folder / "made.safetensors"
    text = folder / "calibration.txt"
    if kind == "import":
        import_model(path, out)
    elif kind == "quantize":
        quantize(path, out, 8)
    else:
        repair = "none" if kind == "prune" else "ridge"
        prune(path, out, blocks=1, repair=repair, calibration=str(text), samples=2, seq_len=16)
    again = Runtime.load(out, device="cpu")
    if kind == "import":
        if digest(again.logits(list(IDS))) != seen.results["logits"]:
            seen.complaints.append("the imported file computes something else")
        if repr(again.default_sampling_params) != seen.results["defaults"]:
            seen.complaints.append("the imported file has other defaults")
        if again.tokenizer is not None and again.tokenizer.encode(TEXT) != runtime.tokenizer.encode(TEXT):
            seen.complaints.append("the imported file tokenises otherwise")


def use_model(path: Path, folder: Path, extra: str = "", chats: bool = True) -> Observation:
    """Open, inspect, load and run the model at `path`. extra: a longer job; chats: render its chat template, too."""
    from depthprune_runtime import InputError, Runtime

    seen = Observation()
    stage = "inspect"
    status, out, err = _command("inspect", str(path))
    seen.shown += [out, err]
    try:
        stage = "load"
        runtime = Runtime.load(path, device="cpu")
        stage = "use"
        _use_runtime(runtime, seen, chats)
        if extra:
            stage = extra
            _extra(extra, path, folder, runtime, seen)
    except InputError as error:
        seen.refused = (stage, str(error))
        return seen
    if status != 0:
        seen.refused = ("inspect", err.removeprefix("depthprune: ").rstrip("\n"))
    return seen


def use_state(path: Path, folder: Path, fast: bool) -> Observation:
    """Go on with a search from the state at `path`."""
    from depthprune_runtime import FinerCutOptions, InputError, prune

    seen = Observation()
    try:
        result = prune(
            folder / "model.safetensors",
            folder / "made.safetensors",
            sublayers=2,
            options=FinerCutOptions(state_file=str(path), fast=fast),
            repair="none",
            calibration=str(folder / "calibration.txt"),
            samples=2,
            seq_len=16,
        )
    except InputError as error:
        seen.refused = ("prune", str(error))
        return seen
    plan = result.plan.to_json()
    ranking = [{k: v for k, v in s.items() if "evaluations" not in k} for s in plan["settings"]["ranking"]]
    seen.results = {"edits": plan["edits"], "ranking": ranking}
    status, out, err = _command("inspect", str(folder / "made.safetensors"))
    seen.shown += [out, err]
    if status:
        seen.complaints.append(f"what was written cannot be inspected: {err}")
    return seen


def use_other(path: Path, folder: Path) -> Observation:
    """Prune a folder of a recurrent decoder, by the function below `prune`."""
    import torch

    from depthprune_runtime import InputError
    from depthprune_runtime.pruning.recurrent.prune import prune_other

    seen = Observation()
    windows = torch.arange(2, 34).view(2, 16)
    try:
        result = prune_other(path, folder / "made", blocks=1, calibration=windows, device="cpu")
    except InputError as error:
        seen.refused = ("prune", str(error))
        return seen
    seen.results = {"dropped": result.dropped, "parameters": result.parameters, "scores": repr(result.scores)}
    return seen


def _asked_for_none(error: str | None) -> bool:
    """Whether the request's own parameters left no token."""
    return error is not None and error.startswith("no token is left")


def _check_output(runtime: Any, output: Any, params: Any, seen: Observation) -> None:
    if len(output.outputs) != params.n:
        seen.complaints.append(f"n {params.n}: {len(output.outputs)} outputs")
    most = runtime.spec.max_position_embeddings if params.max_tokens is None else params.max_tokens
    for one in output.outputs:
        if len(one.token_ids) > most or not all(0 <= i < runtime.spec.vocab_size for i in one.token_ids):
            seen.complaints.append(f"tokens {one.token_ids[:20]} of at most {most}")
        if one.finish_reason not in ("stop", "length") and not _asked_for_none(one.error):
            seen.complaints.append(f"finish_reason {one.finish_reason}")


def _engine(runtime: Any, payload: Mapping[str, Any], params: Any, seen: Observation) -> None:
    """The request beside a plain one, whose tokens must stay what they are alone."""
    from depthprune_runtime import EngineFull, InputError, SamplingParams

    plain = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    engine = runtime.engine(kv_memory=1 << 22, max_num_seqs=8, max_num_batched_tokens=64, max_waiting=64)
    first = engine.add_request(list(IDS), plain, "plain")
    second = None
    try:
        second = engine.add_request(payload["prompt"], params, **payload["request"])
    except (InputError, EngineFull) as error:
        seen.refused = ("add_request", str(error))
    texts: dict[tuple[str, int], str] = {}
    found = {}
    while engine.has_unfinished():
        for delta in engine.step():
            key = (delta.request_id, delta.output_index)
            texts[key] = texts.get(key, "") + delta.text
            if delta.error is not None and not _asked_for_none(delta.error):
                seen.complaints.append(f"request {delta.request_id!r} failed in the engine: {delta.error}")
            if delta.result is not None:
                found[delta.request_id] = delta.result
    engine.check()
    if first not in found:
        seen.complaints.append("the plain request beside it was lost")
        return
    seen.results["plain"] = _completion(found[first])
    for request_id, result in found.items():
        for one in result.outputs:
            if texts[request_id, one.index] != one.text:
                seen.complaints.append(f"deltas {texts[request_id, one.index]!r} are not the text {one.text!r}")
    if second in found and second != first:
        _check_output(runtime, found[second], params, seen)


def _asked(params: Any, options: Mapping[str, Any]) -> Any:
    """`params` with the options that a call has taken in their place."""
    fields = {f.name for f in dataclasses.fields(params)}
    named = {"max_tokens" if name == "max_new_tokens" else name: value for name, value in options.items()}
    return dataclasses.replace(params, **{name: value for name, value in named.items() if name in fields})


def use_request(runtime: Any, payload: Mapping[str, Any]) -> Observation:
    """One request with odd parameters, prompts or messages against a loaded model."""
    from depthprune_runtime import EngineFull, InputError, SamplingParams

    seen = Observation()
    kind = payload["kind"]
    try:
        if kind == "logits":
            runtime.logits(payload["prompt"])
            return seen
        params = SamplingParams(**payload["params"])
        if kind == "engine":
            _engine(runtime, payload, params, seen)
        elif kind == "chat":
            _check_output(runtime, runtime.chat(payload["messages"], params, **payload["options"]), params, seen)
        elif kind == "generate":
            for output in runtime.generate(payload["prompt"], params, **payload["options"]):
                _check_output(runtime, output, _asked(params, payload["options"]), seen)
        else:
            whole = runtime.generate(payload["prompt"], params, **payload["options"])
            texts = {(r, o.index): "" for r, output in enumerate(whole) for o in output.outputs}
            for chunk in runtime.stream(payload["prompt"], params, **payload["options"]):
                texts[chunk.request_index, chunk.output_index] += chunk.text
            if params.temperature == 0 or params.seed is not None:
                expected = {(r, o.index): o.text for r, output in enumerate(whole) for o in output.outputs}
                if texts != expected:
                    seen.complaints.append(f"streamed {texts!r:.300}, generated {expected!r:.300}")
    except (InputError, EngineFull) as error:
        seen.refused = (kind, str(error))
    return seen
