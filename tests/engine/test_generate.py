"""Generation against Transformers, and the promises of `Runtime`."""

from __future__ import annotations

import pico
import pytest
import tokenizer_kinds
import torch
import transformers
from transformers import AutoTokenizer

from depthprune_runtime import InputError, Runtime, SamplingParams
from depthprune_runtime.engine.inputs import Inputs
from depthprune_runtime.evaluation.perplexity import perplexity

PROMPTS = ["the quick brown", "a decoder is a sequence of residual sub-layers and", "naïve", "prune the blocks"]


def greedy_by_transformers(model, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_greedy_tokens_equal_transformers(family, tmp_path):
    model = pico.build_model(family)
    runtime = Runtime.load(pico.save(model, tmp_path), device="cpu")
    ids = [5, 9, 33, 200, 77]
    with torch.no_grad():  # min_new_tokens in the oracle would suppress EOS, so compare raw steps
        expected, row = [], list(ids)
        for _ in range(64):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            expected.append(row[-1])
    out = runtime.generate([ids], temperature=0, max_new_tokens=64, ignore_eos=True)[0].outputs[0]
    assert list(out.token_ids) == expected
    assert out.finish_reason == "length"


def test_batched_unequal_prompts_equal_one_by_one(pico_runtime):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    together = pico_runtime.generate(PROMPTS, params)
    alone = [pico_runtime.generate(p, params)[0] for p in PROMPTS]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert [o.prompt for o in together] == PROMPTS


def test_many_prompts_pass_through_several_groups_and_prefill_parts(pico_runtime, monkeypatch):
    from depthprune_runtime.engine import kept_engine as module

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[2 + i, 7, 9 + i] * (1 + i % 4) for i in range(11)]
    expected = [o.outputs[0].token_ids for o in pico_runtime.generate(prompts, params)]
    monkeypatch.setattr(module, "_MAX_RUNNING", 4)
    monkeypatch.setattr(module, "_PREFILL_TOKENS", 10)
    pico_runtime.close()
    assert [o.outputs[0].token_ids for o in pico_runtime.generate(prompts, params)] == expected
    pico_runtime.close()


def test_more_prompts_than_memory_are_queued(pico_runtime, monkeypatch):
    from depthprune_runtime.engine import kept_engine as module

    params = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True, n=2)
    prompts = [[2 + i, 7, 9 + i] * (1 + i % 4) for i in range(9)]
    expected = [[o.token_ids for o in r.outputs] for r in pico_runtime.generate(prompts, params)]
    free = 2 * 10 * module.kv_block_bytes(pico_runtime.spec, module.KV_BLOCK_SIZE, pico_runtime.dtype)
    pico_runtime.close()
    monkeypatch.setattr(module, "free_memory", lambda _: free)  # half of it: ten kv_blocks, two or three outputs
    assert [[o.token_ids for o in r.outputs] for r in pico_runtime.generate(prompts, params)] == expected
    pico_runtime.close()
    monkeypatch.setattr(module, "free_memory", lambda _: None)  # a device that does not tell
    assert [[o.token_ids for o in r.outputs] for r in pico_runtime.generate(prompts, params)] == expected
    pico_runtime.close()
    monkeypatch.setattr(module, "free_memory", lambda _: free // 5)
    with pytest.raises(InputError, match="never fit into the KV cache of 32 tokens"):
        pico_runtime.generate(prompts, params)


def test_the_plain_call_prints_as_its_text(pico_runtime):
    outputs = pico_runtime.generate("the quick", max_new_tokens=5, ignore_eos=True)
    assert len(outputs) == 1
    assert str(outputs) == outputs.text == outputs[0].outputs[0].text == str(outputs[0]) != ""
    assert outputs[0].prompt == "the quick"
    two = pico_runtime.generate(["the quick", "a decoder"], max_new_tokens=5, ignore_eos=True)
    assert str(two) == f"{two[0].text}\n{two[1].text}"


def test_text_is_what_the_tokenizer_decodes(pico_runtime, pico_llama):
    tokenizer = AutoTokenizer.from_pretrained(pico_llama[1])
    out = pico_runtime.generate("naïve 東京", max_new_tokens=50, temperature=1.0, seed=3)[0]
    assert out.prompt_token_ids == tuple(tokenizer("naïve 東京")["input_ids"])
    assert out.outputs[0].text == tokenizer.decode(list(out.outputs[0].token_ids), skip_special_tokens=True)


def test_eos_and_stop_ids_end_the_output(pico_runtime):
    free = pico_runtime.generate([[5, 6, 7]], temperature=0, max_new_tokens=20, ignore_eos=True)[0].outputs[0]
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    out = pico_runtime.generate([[5, 6, 7]], temperature=0, max_new_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    assert out[0].outputs[0].token_ids == free.token_ids[: first + 1]
    assert (out[0].outputs[0].finish_reason, out[0].outputs[0].stop_reason) == ("stop", stop)


def test_eos_of_the_model_ends_the_output(pico_llama, tmp_path):
    model, _ = pico_llama
    model_ids = [5, 6, 7]
    free = greedy_by_transformers(model, model_ids, 8)
    folder = pico.save(model, tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{free[4]}, 1]}}')
    runtime = Runtime.load(folder, device="cpu")
    out = runtime.generate([model_ids], max_new_tokens=8)[0].outputs[0]
    assert list(out.token_ids) == free[: free.index(free[4]) + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", None)


def test_stop_strings_are_cut_or_kept(pico_runtime):
    options = {"temperature": 1.0, "seed": 11, "max_new_tokens": 60, "ignore_eos": True}
    text = pico_runtime.generate("the", **options)[0].text
    stop = text[10:13]
    out = pico_runtime.generate("the", stop=stop, **options)[0].outputs[0]
    assert out.text == text[: text.index(stop)]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    kept = pico_runtime.generate("the", stop=[stop], include_stop_str_in_output=True, **options)[0]
    assert kept.text == text[: text.index(stop) + len(stop)]
    assert len(out.token_ids) < 60


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_adds_up_to_the_output(pico_runtime, seed):
    options = {"temperature": 1.5, "seed": seed, "max_new_tokens": 40, "n": 2, "stop": ["e ", "\n", "ox"]}
    whole = pico_runtime.generate(PROMPTS, **options)
    text: dict = {}
    ids: dict = {}
    ends: dict = {}
    for chunk in pico_runtime.stream(PROMPTS, **options):
        key = (chunk.request_index, chunk.output_index)
        text[key] = text.get(key, "") + str(chunk)
        ids[key] = ids.get(key, ()) + chunk.token_ids
        ends[key] = chunk.finish_reason
    for i, request in enumerate(whole):
        for output in request.outputs:
            key = (i, output.index)
            assert (text[key], ids[key], ends[key]) == (output.text, output.token_ids, output.finish_reason)


def test_an_abandoned_stream_leaves_no_inference_mode(pico_runtime):
    stream = pico_runtime.stream("the", max_new_tokens=10, ignore_eos=True)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()


def test_seeds_repeat_and_differ(pico_runtime):
    def draw(seed, **options):
        return pico_runtime.generate("the", temperature=1.0, seed=seed, max_new_tokens=20, **options)[0].text

    assert draw(1) == draw(1) != draw(2)
    several = pico_runtime.generate("the", temperature=1.0, seed=1, max_new_tokens=20, n=3)[0].outputs
    assert several[0].text == draw(1)
    assert len({o.text for o in several}) == 3
    in_company = pico_runtime.generate(["a", "the", "b"], temperature=1.0, seed=1, max_new_tokens=20)
    assert in_company[1].text == draw(1)
    assert draw(None) != draw(None)


def test_logprobs_are_those_of_the_model(pico_runtime):
    out = pico_runtime.generate([[4, 5, 6]], temperature=1.0, seed=5, max_new_tokens=10, logprobs=3)[0].outputs[0]
    logits = pico_runtime.logits([4, 5, 6, *out.token_ids])
    total = 0.0
    for step, (token, alternatives) in enumerate(zip(out.token_ids, out.logprobs, strict=True)):
        expected = logits[2 + step].log_softmax(-1)
        assert alternatives[token].logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert alternatives[token].rank == int((expected > expected[token]).sum()) + 1
        assert set(expected.topk(3).indices.tolist()) <= set(alternatives)
        assert len(alternatives) in (3, 4)
        total += float(expected[token])
    assert out.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_chat_uses_the_template(pico_runtime, pico_llama):
    tokenizer = AutoTokenizer.from_pretrained(pico_llama[1])
    messages = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "fox"}]
    out = pico_runtime.chat(messages, max_new_tokens=3)
    assert out.prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert list(out.prompt_token_ids) == list(getattr(expected, "input_ids", None) or expected["input_ids"])


def test_output_stops_at_the_context(pico_runtime):
    ids = [5] * (pico.CONTEXT - 3)
    out = pico_runtime.generate([ids], max_new_tokens=50, ignore_eos=True)[0].outputs[0]
    assert len(out.token_ids) == 3
    assert out.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "empty"),
        ([[5, 9999]], {}, "below 384, got 9999"),
        ([[5, -1]], {}, "got -1"),
        ([[5] * pico.CONTEXT], {}, "at most 255 tokens"),
        ([[5, "a"]], {}, "token ids"),
        ("the", {"temperature": -1}, "temperature: expected a number from 0 to 10000, got -1"),
        ("the", {"top_p": 0}, "top_p"),
        ("the", {"max_new_tokens": 0}, "max_tokens"),
        ("the", {"colour": 1}, "unknown options"),
        ("the", {"stop": [""]}, "stop"),
    ],
)
def test_bad_requests_are_refused(pico_runtime, prompts, options, message):
    with pytest.raises(InputError, match=message):
        pico_runtime.generate(prompts, **options)


def test_without_a_tokenizer_ids_work_and_text_is_refused(pico_llama, tmp_path):
    runtime = Runtime.load(pico.save(pico_llama[0], tmp_path, tokenizer=False), device="cpu")
    assert len(runtime.generate([5, 6], max_new_tokens=3, ignore_eos=True)[0].outputs[0].token_ids) == 3
    for call in (lambda: runtime.generate("the"), lambda: runtime.chat([{"role": "user", "content": "x"}])):
        with pytest.raises(InputError, match="no tokenizer"):
            call()
    with pytest.raises(InputError, match="stop_token_ids"):
        runtime.generate([5], stop="x")


def test_a_tokenizer_can_be_left_out(pico_runtime, pico_llama, tmp_path, caplog):
    folder = pico.save(pico_llama[0], tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    runtime = Runtime.load(folder, device="cpu", skip_tokenizer_init=True)
    assert runtime.tokenizer is None and not caplog.records
    both = [r.generate([5, 6, 7], temperature=0, max_new_tokens=4)[0].outputs[0] for r in (runtime, pico_runtime)]
    assert (both[0].token_ids, both[0].text) == (both[1].token_ids, "")
    for call in (
        lambda: runtime.generate("the"),
        lambda: runtime.generate([5], stop="x"),
        lambda: perplexity(runtime, "the quick brown", seq_len=8),
    ):
        with pytest.raises(InputError, match="skip_tokenizer_init"):
            call()
    (folder / "generation_config.json").write_text("{}")
    Runtime.load(folder, device="cpu", skip_tokenizer_init=True)
    assert "no end token is known" in caplog.text
    caplog.clear()
    bare = Runtime.load(pico.save(pico_llama[0], tmp_path / "bare", tokenizer=False), "cpu", skip_tokenizer_init=True)
    with pytest.raises(InputError, match="carries no tokenizer"):
        bare.generate("the")
    assert "no end token" not in caplog.text


def test_damaged_weights_are_named(pico_llama, tmp_path):
    model = pico.build_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 3e38
    runtime = Runtime.load(pico.save(model, tmp_path), device="cpu")
    with pytest.raises(InputError, match="not finite"):
        runtime.generate("the")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight: expected finite weights"):
        Runtime.load(pico.save(model, tmp_path), device="cpu")


def test_default_sampling_follows_the_models_generation_config(pico_llama, tmp_path):
    folder = pico.save(pico_llama[0], tmp_path)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20}')
    params = Runtime.load(folder, device="cpu").default_sampling_params
    assert (params.temperature, params.top_k) == (0.6, 20)
    (folder / "generation_config.json").write_text("{}")
    assert Runtime.load(folder, device="cpu").default_sampling_params.greedy


@pytest.mark.parametrize("kind", ["byte_fallback", "unigram", "byte_level", "word_piece"])
def test_no_sampled_text_ends_a_request(pico_llama, tmp_path, kind):
    """Random ids, some beyond the tokenizer's vocabulary: every request ends well and its texts add up."""
    folder = pico.save(pico_llama[0], tmp_path, tokenizer=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_kinds.build(kind)).save_pretrained(folder)
    runtime = Runtime.load(folder, device="cpu")
    options = {"temperature": 5.0, "max_new_tokens": 40, "n": 10, "seed": 3, "ignore_eos": True}
    result = runtime.generate("hello", logprobs=3, stop="\0\0\0", **options)[0]
    decode = runtime.tokenizer.decode
    beyond = tokenizer_kinds.build(kind).get_vocab_size()
    assert any(t >= beyond for o in result.outputs for t in o.token_ids)
    for output in result.outputs:
        assert (output.finish_reason, output.error) == ("length", None)
        assert decode(result.prompt_token_ids) + output.text == decode([*result.prompt_token_ids, *output.token_ids])
        for alternatives in output.logprobs:
            texts = [a.decoded_token for t, a in alternatives.items() if t < beyond]
            assert None not in texts and len(set(texts)) == len(texts)
    streamed = dict.fromkeys(range(10), "")
    for chunk in runtime.stream("hello", **options):
        streamed[chunk.output_index] += chunk.text
    assert list(streamed.values()) == [output.text for output in result.outputs]


def test_a_stop_string_may_be_a_special_token(pico_runtime):
    ids = pico_runtime.generate([5, 6, 7], temperature=0, max_new_tokens=8, ignore_eos=True)[0].outputs[0].token_ids
    tokenizer = pico_runtime.tokenizer
    inputs = Inputs("m", pico_runtime.spec, tokenizer, {})
    for skip in (True, False):
        params = SamplingParams(stop="<|user|>", skip_special_tokens=skip, ignore_eos=True, max_tokens=20)
        request = inputs.group("the", params, "r").requests[0]
        request.append(ids[0])
        request.append(tokenizer.encode("<|user|>", add_special_tokens=False)[0])
        assert (request.finish_reason, request.stop_reason) == ("stop", "<|user|>")
        assert request.text == tokenizer.decode([ids[0]])
