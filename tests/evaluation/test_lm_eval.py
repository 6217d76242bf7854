"""The lm-eval model against Transformers and against our own tasks, on tasks over local files."""

from __future__ import annotations

import functools
import json
import sys
from types import SimpleNamespace

import lm_eval
import pico
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.cli import main
from depthprune_runtime.evaluation import lm_eval_adapter
from depthprune_runtime.evaluation.lm_eval_adapter import DepthpruneLM
from depthprune_runtime.evaluation.scoring import encode_pair
from depthprune_runtime.evaluation.task_files import load_task
from depthprune_runtime.evaluation.tasks import evaluate_task
from depthprune_runtime.progress import Progress

TEXT = "the quick brown fox jumps over a lazy dog decoder is sequence of residual blocks"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(rows in our format, YAML task of lm-eval over the same file)."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for i in range(24):
        choices = [" ".join(WORDS[(i * k + 3) % 15 :][: 1 + (i + k) % 4]) for k in (1, 2, 3)]
        rows.append({"context": f"{WORDS[i % 15]} {WORDS[(7 * i) % 15]}", "choices": choices, "gold": i % 3})
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "words.yaml").write_text(yaml.safe_dump(task))
    return data, folder / "words.yaml"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """lm-eval's own index of 10,000 tasks takes seconds to read, and none of them is wanted here."""
    monkeypatch.setattr(
        lm_eval_adapter, "_TaskManager", functools.partial(lm_eval_adapter._TaskManager, include_defaults=False)
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(pico_file):
    return DepthpruneLM(str(pico_file), device="cpu", progress=Progress())


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_accuracies_equal_our_own(pico_file, pico_runtime, files):
    report = lm_eval.simple_evaluate(
        "depthprune",
        model_args=f"pretrained={pico_file},dtype=fp32",
        device="cpu",
        tasks=[str(files[1])],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=100,
    )
    theirs = report["results"]["words"]
    ours = evaluate_task(pico_runtime, load_task(files[0]))
    assert ours.n == report["n-samples"]["words"]["effective"] == 24
    for name in ("acc", "acc_norm"):
        assert theirs[f"{name},none"] == pytest.approx(ours.metrics[name].value)
        assert theirs[f"{name}_stderr,none"] == pytest.approx(ours.metrics[name].stderr)
    assert 0 < ours.metrics["acc"].value < 1
    assert report["config"]["model_num_parameters"] == pico_runtime.spec.num_parameters()


def test_loglikelihood_equals_transformers(pico_llama, pico_runtime, model):
    pairs = [("the quick", " brown fox"), ("the quick ", "dog"), ("", "lazy"), ("naïve", " façade — 東京")]
    scores = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(pairs, scores, strict=True):
        ours, targets = encode_pair(pico_runtime, context, continuation)
        with torch.no_grad():
            logits = pico_llama[0](torch.tensor([[*ours, *targets]])).logits[0]
        expected = sum(float(logits.log_softmax(-1)[len(ours) - 1 + i, t]) for i, t in enumerate(targets))
        assert logprob == pytest.approx(expected, rel=1e-4)


def test_rolling_predicts_every_token_once(pico_llama, model):
    long = " ".join([TEXT] * 20)
    texts = ["the quick brown fox", long]
    totals = model.loglikelihood_rolling(instances("loglikelihood_rolling", *((t,) for t in texts)), disable_tqdm=True)
    for text, total in zip(texts, totals, strict=True):
        ids = model.tok_encode(text)
        expected, done = 0.0, 0
        while done < len(ids):  # full windows; the last one has as much context as fits
            end = min(done + pico.CONTEXT, len(ids))
            window = [0, *ids][max(0, end - pico.CONTEXT) : end]
            with torch.no_grad():
                logprobs = pico_llama[0](torch.tensor([window])).logits[0].log_softmax(-1)
            targets = ids[done:end]
            expected += sum(float(logprobs[i - len(targets), t]) for i, t in enumerate(targets))
            done = end
        assert total == pytest.approx(expected, rel=1e-4)
    assert len(model.tok_encode(long)) > pico.CONTEXT


def test_generation_stops_at_strings_and_keeps_the_order(pico_runtime, model):
    contexts = ["the quick", "a decoder is", "the quick"]
    whole = [str(pico_runtime.generate(c, temperature=0, max_new_tokens=12)) for c in contexts]
    stop = whole[0][3:5]
    arguments = [
        (contexts[0], {"until": [], "max_gen_toks": 12}),
        (contexts[1], {"until": "", "max_gen_toks": 12, "do_sample": False, "temperature": 1.0}),
        (contexts[2], {"until": [stop, ""], "max_gen_toks": 12}),
    ]
    texts = model.generate_until(instances("generate_until", *arguments), disable_tqdm=True)
    assert texts == [whole[0], whole[1], whole[0][: whole[0].index(stop)]]
    sampled = ("the", {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "seed": 3, "max_gen_toks": 8})
    again = model.generate_until(instances("generate_until", sampled), disable_tqdm=True)
    expected = pico_runtime.generate("the", temperature=0.9, top_p=0.8, seed=3, max_new_tokens=8)
    assert again == [str(expected)]


def test_long_prompts_make_room_for_new_tokens(pico_runtime, model):
    text = " ".join([TEXT] * 20)
    kept = pico_runtime.tokenizer.encode(text)[-(pico.CONTEXT - 8) :]
    expected = pico_runtime.generate([kept], temperature=0, max_new_tokens=8)[0].text
    options = {"until": [], "max_gen_toks": 8}
    assert model.generate_until(instances("generate_until", (text, options)), disable_tqdm=True) == [expected]
    for wrong, message in (({"max_gen_toks": pico.CONTEXT}, "max_gen_toks"), ({"num_beams": 4}, "num_beams")):
        with pytest.raises(InputError, match=message):
            model.generate_until(instances("generate_until", ("the", wrong)), disable_tqdm=True)


def test_chat_templates(pico_runtime, model):
    history = [{"role": "user", "content": "the fox"}]
    prompt = model.apply_chat_template(history)
    assert prompt == pico_runtime.tokenizer.apply_chat_template(history)
    assert model.chat_template(True) == pico.CHAT_TEMPLATE
    assert model.tokenizer_name
    assert model.tok_encode("<s>the") == model.tok_encode("the")  # a template's own BOS is not doubled
    assert (model.prefix_token_id, model.eot_token_id) == (0, 1)


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}</m>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [pico.CHAT_TEMPLATE, NO_SYSTEM])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be brief"}]])
@pytest.mark.parametrize("begun", [[], [{"role": "assistant", "content": "jumps"}]])
def test_prompts_are_those_of_the_harness(model, monkeypatch, template, system, begun):
    theirs = pico.build_tokenizer()
    theirs.chat_template = template
    harness = SimpleNamespace(tokenizer=theirs, chat_template_args={})
    monkeypatch.setitem(model.tokenizer.chat_templates, "default", template)
    history = [*system, {"role": "user", "content": "the fox"}, *begun]
    expected = HFLM.apply_chat_template(harness, history, add_generation_prompt=not begun)
    assert model.apply_chat_template(history, add_generation_prompt=not begun) == expected


def test_messages_that_a_template_refuses_anyhow_are_named(model, monkeypatch):
    monkeypatch.setitem(model.tokenizer.chat_templates, "default", "{{ raise_exception('never') }}")
    for roles in (["user"], ["system"], ["system", "user"]):
        with pytest.raises(InputError, match="refused by the model's chat template: never"):
            model.apply_chat_template([{"role": role, "content": "x"} for role in roles])


def test_model_arguments_win_over_the_harness_options(pico_file, monkeypatch, caplog):
    arguments = f"pretrained={pico_file},device=cpu,dtype=bf16"
    made = DepthpruneLM.create_from_arg_string(arguments, {"device": "cuda:0", "batch_size": 1, "max_batch_size": None})
    assert (made.device.type, made.runtime.dtype) == ("cpu", torch.bfloat16)
    assert caplog.text == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = DepthpruneLM.create_from_arg_obj({"pretrained": str(pico_file)}, {"device": "cuda:0"})
    assert made.device.type == "cpu"
    assert "default cuda:0 is not available" in caplog.text


def test_a_model_without_a_tokenizer_is_refused(pico_llama, tmp_path):
    bare = DepthpruneLM(Runtime.load(pico.save(pico_llama[0], tmp_path, tokenizer=False), device="cpu"))
    for call in (lambda: bare.tok_encode("a"), lambda: bare.eot_token_id, lambda: bare.apply_chat_template([])):
        with pytest.raises(InputError, match="tokenizer"):
            call()


def test_command_runs_lm_eval_tasks(pico_file, files, capsys):
    data, task = files
    assert main(["evaluate", str(pico_file), "--tasks", f"{task},{data}", "--json", "-q", "--limit", "10"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)
    assert (ours["source"], theirs["source"]) == (str(data), "lm-eval")
    assert ours["n"] == theirs["n"] == 10
    for name in ("acc", "acc_norm"):
        assert ours["metrics"][name]["value"] == pytest.approx(theirs["metrics"][name]["value"])
        assert ours["metrics"][name]["stderr"] == pytest.approx(theirs["metrics"][name]["stderr"])


def test_unknown_and_unloadable_tasks_are_one_line(pico_file, tmp_path, capsys):
    assert main(["evaluate", str(pico_file), "--tasks", "nosuchtask", "-q"]) == 1
    assert "lm-eval knows no such tasks" in capsys.readouterr().err
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.json}\ntest_split: test\n"
    )
    assert main(["evaluate", str(pico_file), "--tasks", str(broken), "-q"]) == 1
    captured = capsys.readouterr()
    assert "lm-eval cannot load them" in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_without_lm_eval_the_extra_is_named(pico_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what an import of it then finds
    monkeypatch.delitem(sys.modules, lm_eval_adapter.__name__)
    assert main(["evaluate", str(pico_file), "--tasks", "mmlu", "-q"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "task mmlu" in captured.err
    assert "install the extra [eval]" in captured.err


def test_the_harness_command_knows_the_model(monkeypatch, capsys):
    """`python -m` of the module is lm-eval's own command line."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
    with pytest.raises(SystemExit):
        lm_eval_adapter.main()
    assert "--model_args" in capsys.readouterr().out
    from lm_eval.api.registry import get_model

    assert get_model("depthprune") is DepthpruneLM
