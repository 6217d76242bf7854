"""Scores against Transformers' log-softmax, JSONL tasks against accuracies worked out by hand, and the command."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import namedtuple

import pico
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from task_rows import ROWS, SCHEMAS, write

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.cli import main
from depthprune_runtime.evaluation import logprobs, tasks
from depthprune_runtime.evaluation.scoring import ContinuationScore, continuation_logprobs, encode_pair
from depthprune_runtime.evaluation.task_files import load_task
from depthprune_runtime.evaluation.tasks import evaluate_task

IDS = st.integers(0, pico.VOCAB_SIZE - 1)
# Few contexts and several continuations of each, so that sharing happens at every length of a context.
GROUPS = st.lists(
    st.tuples(st.lists(IDS, min_size=1, max_size=40), st.lists(st.lists(IDS, min_size=1, max_size=20), max_size=4)),
    max_size=4,
)
NEXT_WORDS = [
    {"context": "the quick brown fox jumps over the lazy", "continuation": "dog"},
    {"context": "prune the blocks that change the hidden state\nthe", "continuation": "least often"},
    {"context": "a decoder is a sequence of", "continuation": "blocks"},
]


def brute_force(model, context, continuation):
    """Transformers, one request at a time, no cache: sum of the targets' log-softmax, and whether all are arg-max."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logprobs = model(ids[:, :-1], use_cache=False).logits[0, -len(continuation) :].log_softmax(-1)
    targets = ids[0, -len(continuation) :]
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


def close(ours, theirs):
    assert ours.logprob == pytest.approx(theirs[0], rel=1e-4, abs=1e-3)
    assert ours.is_greedy == theirs[1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=GROUPS, batch_tokens=st.sampled_from([1, 50, 4096]))
def test_scores_equal_transformers(pico_llama, pico_runtime, groups, batch_tokens):
    requests = [(context, continuation) for context, several in groups for continuation in several]
    scores = continuation_logprobs(pico_runtime, requests, batch_tokens)
    assert len(scores) == len(requests)
    for request, score in zip(requests, scores, strict=True):
        close(score, brute_force(pico_llama[0], *request))


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_shared_contexts_in_every_family(family, tmp_path):
    """Also with a sliding window that ends inside the shared context."""
    model = pico.build_model(family)
    runtime = Runtime.load(pico.save(model, tmp_path), device="cpu")
    context = torch.randint(2, pico.VOCAB_SIZE, (37,), generator=torch.Generator().manual_seed(1)).tolist()
    requests = [(context, [5, 9]), (context[:5], [5]), (context, [7]), (context, list(range(20)))]
    for request, score in zip(requests, continuation_logprobs(runtime, requests), strict=True):
        close(score, brute_force(model, *request))


def test_greedy_continuations_are_told(pico_runtime):
    context = pico_runtime.tokenizer.encode("the quick brown")
    made = pico_runtime.generate([context], temperature=0, max_new_tokens=6, ignore_eos=True)[0].outputs[0]
    ids = list(made.token_ids)
    good, bad = continuation_logprobs(pico_runtime, [(context, ids), (context, [*ids[:-1], (ids[-1] + 1) % 300])])
    assert good.is_greedy
    assert not bad.is_greedy
    assert good.logprob > bad.logprob


def test_logits_come_in_chunks(pico_runtime, monkeypatch):
    requests = [([1, 2, 3], list(range(30))), ([4], [5, 6])]
    whole = continuation_logprobs(pico_runtime, requests)
    monkeypatch.setattr(logprobs, "_LOGIT_ROWS", 7)
    monkeypatch.setattr(logprobs, "_CPU_ROWS", 3)
    for a, b in zip(continuation_logprobs(pico_runtime, requests), whole, strict=True):
        close(a, b)


def test_long_contexts_lose_their_left(pico_llama, pico_runtime, caplog):
    ids = torch.randint(2, pico.VOCAB_SIZE, (pico.CONTEXT + 30,), generator=torch.Generator().manual_seed(2)).tolist()
    fitting, long = (ids[-pico.CONTEXT + 4 :], [7, 8, 9, 10, 11]), (ids, [7, 8, 9])
    with caplog.at_level(logging.WARNING):
        scores = continuation_logprobs(pico_runtime, [fitting, long, (ids, [3])])
    close(scores[0], brute_force(pico_llama[0], *fitting))
    close(scores[1], brute_force(pico_llama[0], ids[-(pico.CONTEXT - 2) :], [7, 8, 9]))  # all input tokens are used
    close(scores[2], brute_force(pico_llama[0], ids[-pico.CONTEXT :], [3]))
    assert "2 of 3 texts are longer than the model's context" in caplog.text


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([([], [1])], r"requests\[0\]: .* got no context"),
        ([([1], [1]), ([1], [])], r"requests\[1\]: .* got no continuation"),
        ([([1], [2] * (pico.CONTEXT + 1))], "at most 256 tokens"),
        ([([1], [pico.VOCAB_SIZE])], "token ids from 0 to 383"),
    ],
)
def test_impossible_requests(pico_runtime, requests, message):
    with pytest.raises(InputError, match=message):
        continuation_logprobs(pico_runtime, requests)
    with pytest.raises(InputError, match="batch_tokens"):
        continuation_logprobs(pico_runtime, [], batch_tokens=0)


def test_damaged_weights_are_told(tmp_path):
    folder = pico.save(pico.build_model("llama"), tmp_path, tokenizer=False)
    runtime = Runtime.load(pico.save_damaged(folder, tmp_path / "damaged", "lm_head.weight", math.nan), device="cpu")
    with pytest.raises(InputError, match="not finite"):
        continuation_logprobs(runtime, [([1], [2])])
    with pytest.raises(InputError, match="carries no tokenizer"):
        encode_pair(runtime, "a", "b")


def test_pairs_are_split_by_token_count(pico_runtime):
    tokenizer = pico_runtime.tokenizer
    assert encode_pair(pico_runtime, "the quick", " brown") == (
        tokenizer.encode("the quick"),
        tokenizer.encode("the quick brown")[len(tokenizer.encode("the quick")) :],
    )
    assert encode_pair(pico_runtime, "the quick ", "brown") == encode_pair(pico_runtime, "the quick", " brown")
    assert encode_pair(pico_runtime, "", "brown") == ([0], tokenizer.encode("brown", add_special_tokens=False))


def expected_accuracies(model, runtime, rows):
    hits, normed = [], []
    for row in rows:
        sums = [brute_force(model, *encode_pair(runtime, row["context"], " " + c))[0] for c in row["choices"]]
        per_character = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]
        hits.append(sums.index(max(sums)) == row["gold"])
        normed.append(per_character.index(max(per_character)) == row["gold"])
    return hits, normed


def test_accuracies_equal_transformers(pico_llama, pico_runtime, tmp_path):
    task = load_task(write(tmp_path / "mine.jsonl", ROWS))
    result = evaluate_task(pico_runtime, task)
    hits, normed = expected_accuracies(pico_llama[0], pico_runtime, ROWS)
    assert (result.task, result.n) == ("mine", 4)
    for name, values in (("acc", hits), ("acc_norm", normed)):
        metric = result.metrics[name]
        assert metric.value == pytest.approx(sum(values) / 4)
        assert metric.stderr == pytest.approx(statistics.stdev(map(float, values)) / math.sqrt(4))


def scored(monkeypatch, path, *logprobs):
    """Result with the model's scores replaced."""
    monkeypatch.setattr(tasks, "encode_pair", lambda *_: ([1], [1]))
    monkeypatch.setattr(tasks, "continuation_logprobs", lambda *_: [ContinuationScore(s, False) for s in logprobs])
    return evaluate_task(None, load_task(path)).metrics


def test_characters_norm_and_ties_go_to_the_first(tmp_path, monkeypatch):
    row = {"context": "c", "choices": ["ab", "abcdefghij"], "gold": 1}
    path = write(tmp_path / "t.jsonl", [row])
    metrics = scored(monkeypatch, path, -2.0, -5.0)  # -1 and -0.5 a character
    assert (metrics["acc"].value, metrics["acc_norm"].value) == (0.0, 1.0)
    assert metrics["acc"].stderr is None
    assert scored(monkeypatch, path, -1.0, -1.0)["acc"].value == 0.0


def test_winogrande_compares_contexts(pico_llama, pico_runtime, tmp_path, monkeypatch):
    path = write(tmp_path / "w.jsonl", SCHEMAS)
    hits = []
    for row in SCHEMAS:
        pairs = [encode_pair(pico_runtime, c, " " + row["continuation"]) for c in row["contexts"]]
        sums = [brute_force(pico_llama[0], *pair)[0] for pair in pairs]
        hits.append(sums.index(max(sums)) == row["gold"])
    result = evaluate_task(pico_runtime, load_task(path))
    assert set(result.metrics) == {"acc"}
    assert result.metrics["acc"].value == sum(hits) / 2
    assert scored(monkeypatch, path, -1.0, -2.0, -1.0, -2.0)["acc"].value == 0.5


def greedy_words(model, runtime, context, continuation):
    """Whether Transformers, choosing the likeliest token at each place, writes the continuation, and its log p."""
    context_ids, targets = encode_pair(runtime, context, " " + continuation)
    ids, logprob = list(context_ids), 0.0
    right = True
    for target in targets:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        right = right and int(logits.argmax()) == target
        logprob += float(logits[target] - logits.logsumexp(-1))
        ids.append(target)
    return right, logprob


def test_next_words_are_right_when_they_are_the_greedy_choice(pico_llama, pico_runtime, tmp_path):
    rows = list(NEXT_WORDS)
    for row in NEXT_WORDS:  # and rows that the model does get right: what it writes by itself
        ids = encode_pair(pico_runtime, row["context"], " x")[0]
        with torch.no_grad():
            first = int(pico_llama[0](torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        text = pico_runtime.tokenizer.decode([*ids, first])
        if text.startswith(row["context"] + " "):
            rows.append({"context": row["context"], "continuation": text[len(row["context"]) + 1 :]})
    expected = [greedy_words(pico_llama[0], pico_runtime, **row) for row in rows]
    result = evaluate_task(pico_runtime, load_task(write(tmp_path / "lambada.jsonl", rows)))
    assert set(result.metrics) == {"acc", "perplexity"}
    assert result.hits["acc"] == tuple(int(right) for right, _ in expected)
    assert 0 < sum(result.hits["acc"]) < len(rows)
    mean = sum(logprob for _, logprob in expected) / len(rows)
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-3)


def test_next_words_ask_for_every_token(tmp_path, monkeypatch):
    """Two rows: all tokens greedy, and not all of them."""
    path = write(tmp_path / "lambada.jsonl", NEXT_WORDS[:2])
    monkeypatch.setattr(tasks, "encode_pair", lambda *_: ([1], [1]))
    scores = [ContinuationScore(-9.0, True), ContinuationScore(-1.0, False)]
    monkeypatch.setattr(tasks, "continuation_logprobs", lambda *_: scores)
    result = evaluate_task(None, load_task(path))
    assert result.hits == {"acc": (1, 0)}
    perplexity = result.metrics["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(5))
    # the mean of 9 and 1 has a standard error of 4, and exp multiplies an error by its own value
    assert perplexity.stderr == pytest.approx(4 * math.exp(5))


def test_an_offset_leaves_out_the_first_rows(pico_runtime, tmp_path):
    path = write(tmp_path / "mine.jsonl", ROWS)
    whole = evaluate_task(pico_runtime, load_task(path))
    part = evaluate_task(pico_runtime, load_task(path, limit=2, offset=1))
    assert (part.n, part.offset) == (2, 1)
    assert part.hits == {name: hits[1:3] for name, hits in whole.hits.items()}
    assert load_task(path, offset=3).examples == load_task(path).examples[3:]


Done = namedtuple("Done", "status out err")


def command(capsys, *args):
    capsys.readouterr()
    status = main(["evaluate", *(str(a) for a in args)])
    return Done(status, *capsys.readouterr())


def test_command(pico_file, tmp_path, capsys, monkeypatch):
    write(tmp_path / "piqa.jsonl", ROWS)
    other = write(tmp_path / "other.jsonl", SCHEMAS)
    monkeypatch.setenv("DEPTHPRUNE_DATA", str(tmp_path))
    done = command(capsys, pico_file, "--tasks", f"piqa,{other}", "--limit", 3)
    assert done.status == 0
    header, first, second = done.out.splitlines()
    assert header.split() == ["task", "n", "acc", "stderr", "acc_norm", "stderr", "other"]
    assert first.split()[:2] == ["piqa", "3"]
    assert second.split()[:2] == ["other", "2"]
    assert "piqa" in done.err
    done = command(capsys, pico_file, "--tasks", f"piqa,{other}", "--limit", 3, "--json", "-q")
    report = json.loads(done.out)
    assert [(r["task"], r["n"]) for r in report] == [("piqa", 3), ("other", 2)]
    assert f"{report[0]['metrics']['acc']['value']:.4f}" == first.split()[2]
    assert done.err == ""


def test_mistakes_are_one_line(pico_file, tmp_path, capsys):
    bad = write(tmp_path / "bad.jsonl", [{"context": "c"}])
    for names, message in (
        (bad, f"{bad}:1: expected a row with choices"),
        ("no.jsonl", "no such file"),
        (",", "at least one"),
    ):
        done = command(capsys, pico_file, "--tasks", names)
        assert (done.status, done.out) == (1, "")
        assert done.err.count("\n") == 1
        assert message in done.err
