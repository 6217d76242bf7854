"""lm-evaluation-harness over `Runtime`: the model `depthprune`, and the harness's tasks from our command line.

    python -m depthprune_runtime.evaluation.lm_eval_adapter --model depthprune --model_args pretrained=FILE --tasks X

is the harness's own command line with our model registered; `lm_eval` by itself looks for no models outside
its package (0.4.13). In Python, importing this module registers it. Needs the extra [eval]; importing without
it raises InputError.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.runtime import Runtime
from depthprune_runtime.errors import InputError
from depthprune_runtime.evaluation import scoring
from depthprune_runtime.evaluation.results import Metric, TaskResult
from depthprune_runtime.progress import Progress

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise InputError("lm-eval is not installed; install the extra [eval]") from error

logger = logging.getLogger(__name__)
_DEFAULT_DEVICE = "cuda:0"  # of lm-eval's command line
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_RUNNING = 64  # contexts generated together
_BOOTSTRAP_ROUNDS = 1000  # for metrics without a formula of their standard error


@register_model("depthprune")
class DepthpruneLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a Runtime.

    pretrained: what `Runtime.load` takes, or a loaded Runtime (then device and dtype are its own);
    batch_tokens: tokens in one forward pass; max_gen_toks: new tokens where a task does not say.
    lm-eval always hands over batch_size and max_batch_size: texts are packed by tokens here, so both are unused.
    """

    def __init__(
        self,
        pretrained: str | Runtime,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 4096,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.runtime = pretrained if isinstance(pretrained, Runtime) else Runtime.load(pretrained, device, dtype)
        self.tokenizer = self.runtime.tokenizer  # lm-eval reads its chat_template
        self.max_length = self.runtime.spec.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self._batch_tokens = batch_tokens
        self._device = self.runtime.device
        self._progress = progress

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DepthpruneLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> DepthpruneLM:
        """From --model_args, which win over lm-eval's own options; its default device is cuda:0 on any machine."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict
        if options.get("device") == _DEFAULT_DEVICE and "device" not in arg_dict and not torch.cuda.is_available():
            logger.warning("device: lm-eval's default %s is not available; using the CPU", _DEFAULT_DEVICE)
            options["device"] = "cpu"
        return cls(**options)

    def _bar(self, disable_tqdm: bool) -> Progress:
        return self._progress or Progress(visible=not disable_tqdm)

    @property
    def eot_token_id(self) -> int:
        token = None if self.tokenizer is None else self.tokenizer.special_token_id("eos_token")
        if token is None:
            raise InputError(f"{self.runtime.name}: its tokenizer names no EOS token")
        return token

    @property
    def prefix_token_id(self) -> int:
        return scoring.prefix_token_id(self.runtime)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's request cache is keyed by."""
        return self.runtime.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """add_special_tokens: None adds them, unless a chat template has already written a BOS."""
        if add_special_tokens is None:
            add_special_tokens = not self._starts_with_bos(string)
        return scoring.encode(self.runtime, string, add_special_tokens)

    def _starts_with_bos(self, string: str) -> bool:
        bos = None if self.tokenizer is None else self.tokenizer.special_token_id("bos_token")
        if self.tokenizer is None or bos is None:
            return False
        return string.startswith(self.tokenizer.decode([bos], skip_special_tokens=False))

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt; without a generation prompt the last message is one that the model has begun to write.

        As in lm-eval's HFLM, a template that refuses the messages gets them without those of the system.
        """
        tokenizer = self.runtime.require_tokenizer("it has no chat template")
        begun = not add_generation_prompt
        try:
            return tokenizer.apply_chat_template(chat_history, continue_final_message=begun)
        except InputError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            logger.warning("%s; trying again without the system's messages", error)
        return tokenizer.apply_chat_template(others, continue_final_message=begun)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval records about the model beside its results."""
        return {
            "model_num_parameters": self.runtime.spec.num_parameters(),
            "model_dtype": str(self.runtime.dtype),
            "model_plan": None if self.runtime.plan is None else self.runtime.plan.get("method"),
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],  # (texts, context ids, continuation ids)
        disable_tqdm: bool = False,
        **_options: object,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with self._bar(disable_tqdm).stage("loglikelihood", len(pairs)) as advance:
            scores = scoring.continuation_logprobs(self.runtime, pairs, self._batch_tokens, advance)
        results = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:  # windows of a rolling text are cached as a whole
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once, with as much context as fits."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the task's stop strings; greedy unless the task samples."""
        texts = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(index)
        with self._bar(disable_tqdm).stage("generate", len(requests)) as advance:
            for indices in by_options.values():
                params = self._sampling_params(requests[indices[0]].args[1])
                for first in range(0, len(indices), _RUNNING):
                    chosen = indices[first : first + _RUNNING]
                    prompts = [self._prompt(requests[i].args[0], params.max_tokens) for i in chosen]
                    for index, output in zip(chosen, self.runtime.generate(prompts, params), strict=True):
                        if output.outputs[0].error is not None:  # its text so far is no answer
                            raise InputError(output.outputs[0].error)
                        texts[index] = output.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, output.text)
                        advance()
        return texts

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """Ids of the context's end, as much as leaves room for the new tokens."""
        room = self.max_length - max_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks: expected less than the model's context {self.max_length}, got {max_tokens}"
            )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _sampling_params(self, options: Mapping[str, Any]) -> SamplingParams:
        """Greedy unless the task samples; the model's own generation config plays no part."""
        given = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        stop = tuple(text for text in given.pop("until") if text)
        max_tokens = given.pop("max_gen_toks")
        if not given.pop("do_sample"):
            given["temperature"] = 0.0
        unknown = sorted(set(given) - set(_SAMPLING_OPTIONS))
        if unknown:
            raise InputError(f"generation options {unknown}: not supported; known are {list(_SAMPLING_OPTIONS)}")
        return SamplingParams(max_tokens=max_tokens, stop=stop, **given)


class _TaskManager(TaskManager):  # type: ignore[misc]
    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:  # data sets come from the network: errors of many types
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"tasks {task_list}: lm-eval cannot load them: {reason}") from error


class LmEvalTasks:
    """Tasks and groups by lm-eval's own names, or YAML files of its format. Unknown names raise InputError."""

    def __init__(self, names: Sequence[str], limit: int | None = None) -> None:
        self.names = list(names)
        self.limit = limit
        self._manager = _TaskManager()
        unknown = [n for n in names if not Path(n).is_file() and not self._manager.match_tasks([n])]
        if unknown:
            raise InputError(f"tasks {unknown}: no .jsonl[.gz] files, and lm-eval knows no such tasks")

    def evaluate(
        self, runtime: Runtime, batch_tokens: int = 4096, progress: Progress | None = None
    ) -> list[TaskResult]:
        """Every task and group of the result, with all metrics that lm-eval reports."""
        model = DepthpruneLM(runtime, batch_tokens=batch_tokens, progress=progress or Progress())
        with contextlib.redirect_stdout(sys.stderr):  # some tasks print; our stdout carries results
            report = simple_evaluate(
                model,
                tasks=self.names,
                task_manager=self._manager,
                limit=self.limit,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_ROUNDS,
            )
        return _results(report)


def _results(report: Mapping[str, Any]) -> list[TaskResult]:
    """lm-eval's report: metrics are keyed `name,filter`, `name_stderr,filter`; the filter `none` is left out."""
    found = []
    for task, values in report["results"].items():
        metrics = {}
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            label = name if kind == "none" else key
            metrics[label] = Metric(float(value), float(stderr) if isinstance(stderr, int | float) else None)
        counts = report.get("n-samples", {}).get(task)
        found.append(TaskResult(task, "lm-eval", counts["effective"] if counts else None, metrics))
    return found


def main() -> None:
    """lm-eval's own command line, knowing our model."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        raise SystemExit(f"depthprune: {error}") from error  # one line on stderr, status 1


if __name__ == "__main__":
    main()
