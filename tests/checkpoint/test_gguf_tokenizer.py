"""Tokenizers of GGUF files: from the file's own metadata alone, split and merged as the model's makers did."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pico
import pytest
import tokenizers
from gguf_files import write_gguf

from depthprune_runtime import InputError
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.checkpoint.gguf_tokenizer import _merges_by_score
from depthprune_runtime.text.tokenizer import Tokenizer

K = "tokenizer.ggml."
TURN = "<\uff5cend\u2581of\u2581turn\uff5c>"
TEXTS = [
    "the quick brown fox", " naïve  façade\n\n东京 🙂", "it's 12345 o'clock, we'LL see", "<|user|>hi<|assistant|>",
    "a\r\n\tb  ",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return pico.build_model("llama", num_hidden_layers=1)


def byte_level(pre="gpt-2", **changes):
    """Metadata of the pico models' tokenizer, as llama.cpp's converter writes it."""
    content = json.loads(pico.build_tokenizer().backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    special = {token["id"] for token in content["added_tokens"]}
    metadata = {
        K + "model": "gpt2",
        K + "pre": pre,
        K + "tokens": sorted(vocab, key=vocab.get),
        K + "token_type": [3 if i in special else 1 for i in range(len(vocab))],
        K + "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        K + "bos_token_id": 0,
        K + "eos_token_id": 1,
        K + "add_bos_token": True,
        "tokenizer.chat_template": pico.CHAT_TEMPLATE,
    }
    return {k: v for k, v in (metadata | {K + k: v for k, v in changes.items()}).items() if v is not None}


def opened(model, folder, metadata):
    return open_checkpoint(write_gguf(model, folder / "m.gguf", metadata=metadata))


def splits(metadata, model, folder, text):
    """Where the pre-tokenizer cuts `text`."""
    raw = tokenizers.Tokenizer.from_str(opened(model, folder, metadata).assets["tokenizer.json"].decode())
    return [text[a:b] for _, (a, b) in raw.pre_tokenizer.pre_tokenize_str(text)]


def test_it_is_the_models_own(model, tmp_path):
    theirs = pico.build_tokenizer()
    checkpoint = opened(model, tmp_path, byte_level())
    ours = Tokenizer(checkpoint)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert (ours.special_token_id("bos_token"), ours.special_token_id("eos_token")) == (0, 1)


def test_only_what_is_in_the_file_counts(model, tmp_path):
    alone = dict(opened(model, tmp_path, byte_level()).assets)
    other = pico.build_tokenizer()
    other.add_tokens(["the quick brown fox"])
    other.chat_template = "somebody else's"
    other.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert dict(open_checkpoint(tmp_path / "m.gguf").assets) == alone


def test_a_file_without_vocabulary_takes_none_from_its_folder(model, tmp_path):
    pico.build_tokenizer().save_pretrained(tmp_path)
    assert dict(opened(model, tmp_path, {}).assets) == {}


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
@pytest.mark.parametrize(
    ("value", "got"), [(1, "1"), (False, "False"), (0.5, "0.5"), ([pico.CHAT_TEMPLATE], "an array of 1")]
)
def test_a_chat_template_that_is_no_text_is_refused(model, tmp_path, key, value, got):
    checkpoint = opened(model, tmp_path, byte_level() | {key: value})
    with pytest.raises(InputError) as raised:
        Tokenizer(checkpoint)
    assert str(raised.value).endswith(f"m.gguf: {key}: expected a text, got {got}")


def test_an_empty_chat_template_is_none(model, tmp_path):
    checkpoint = opened(model, tmp_path, byte_level() | {"tokenizer.chat_template": ""})
    assert Tokenizer(checkpoint).chat_template is None


def test_all_end_tokens_are_read(model, tmp_path):
    def ends(**changes):
        return json.loads(opened(model, tmp_path, byte_level(**changes)).assets["generation_config.json"])

    assert ends() == {"bos_token_id": 0, "eos_token_id": 1}
    assert ends(eot_token_id=5, eom_token_id=6)["eos_token_id"] == [1, 5, 6]
    assert ends(eot_token_id=1)["eos_token_id"] == 1
    assert ends(eos_token_id=None, eot_token_id=3)["eos_token_id"] == 3
    with pytest.raises(InputError, match=r"m\.gguf: tokenizer\.ggml\.eot_token_id: expected an id below 384, got 384"):
        ends(eot_token_id=pico.VOCAB_SIZE)


def test_control_tokens_that_end_a_turn_do_so_without_a_key(model, tmp_path):
    """As in llama.cpp: a converter names one of `<|im_end|>` and `<|endoftext|>` only, and a model writes both."""
    tokens = [*byte_level()[K + "tokens"][:-3], "<|endoftext|>", "<|im_end|>", "<|eot_id|>"]
    types = [1] * (len(tokens) - 3) + [3, 3, 1]  # the last one is text
    files = opened(model, tmp_path, byte_level(tokens=tokens, token_type=types, merges=["a b"])).assets
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [1, len(tokens) - 3, len(tokens) - 2]
    files = opened(model, tmp_path, byte_level(tokens=tokens, token_type=types, eos_token_id=len(tokens) - 2)).assets
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [len(tokens) - 2, len(tokens) - 3]


def test_chat_templates_with_names(model, tmp_path):
    metadata = byte_level() | {
        "tokenizer.chat_template.tool_use": "{{ tools[0].name }}",
    }
    tokenizer = Tokenizer(opened(model, tmp_path, metadata))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tools=[{"name": "f"}]) == "f"
    assert tokenizer.apply_chat_template(messages).startswith("<|user|>")
    assert set(tokenizer.chat_templates) == {"default", "tool_use"}


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "It's 12345!\n\nx", ["It", "'s", " 12345", "!", "\n", "\n", "x"]),
        ("smollm", "It's 12345!\n\n1", ["It", "'s", " ", "1", "2", "3", "4", "5", "!", "\n\n", "1"]),
        ("qwen2", "IT'S 12!\n\nx", ["IT", "'S", " ", "1", "2", "!\n\n", "x"]),
        ("llama-bpe", "IT'S 12345!\n\nx", ["IT", "'S", " ", "123", "45", "!\n\n", "x"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("gpt-4o", "camelCase's 1234", ["camel", "Case's", " ", "123", "4"]),
        ("deepseek-v3", "a1234東x", ["a", "123", "4", "東", "x"]),
        ("deepseek-coder", "a 12", ["a", " ", "1", "2"]),
        ("default", "ab, 1234", ["ab", ",", " ", "123", "4"]),
        ("falcon", "a=1234", ["a", "=", "123", "4"]),
    ],
)
def test_text_is_split_as_the_file_says(model, tmp_path, pre, text, expected):
    assert splits(byte_level(pre), model, tmp_path, text) == expected


def test_tokens_of_llama3_need_no_merges(model, tmp_path):
    """Its tokenizer takes a piece that is a token whole, even where no merge leads to it."""
    tokens = [*byte_level()[K + "tokens"], "Ġzq"]
    changes = {"tokens": tokens, "token_type": None, "add_bos_token": None}
    checkpoint = opened(model, tmp_path, byte_level("llama-bpe", **changes))
    assert Tokenizer(checkpoint).encode(" zq") == [0, len(tokens) - 1]  # and BOS unless the file says otherwise
    checkpoint = opened(model, tmp_path, byte_level("qwen2", **changes))
    assert len(Tokenizer(checkpoint).encode(" zq")) == 3


def test_an_unknown_split_is_refused_and_a_missing_one_named(model, tmp_path, caplog):
    checkpoint = opened(model, tmp_path, byte_level("who-knows"))
    assert "tokenizer.json" in checkpoint.assets
    assert json.loads(checkpoint.assets["generation_config.json"])["eos_token_id"] == 1  # of use without a tokenizer
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.pre: 'who-knows' is not known \(known are .*llama-bpe"):
        checkpoint.assets["tokenizer.json"]
    assert "tokenizer.ggml.pre" not in caplog.text
    assert splits(byte_level(None), model, tmp_path, "ab, 1234") == ["ab", ",", " ", "123", "4"]
    assert "tokenizer.ggml.pre" in caplog.text


def test_added_tokens_that_are_not_spelled_in_bytes(model, tmp_path):
    """Control and user-defined tokens are literal text, whatever characters they have."""
    tokens = [*byte_level()[K + "tokens"][:-2], TURN, "  "]
    types = [1] * (len(tokens) - 2) + [3, 4]
    kept = {tuple(m.split(" ")) for m in byte_level()[K + "merges"]}
    merges = [" ".join(m) for m in kept if "".join(m) in tokens]
    changes = {"tokens": tokens, "token_type": types, "merges": merges, "add_bos_token": False}
    tokenizer = Tokenizer(opened(model, tmp_path, byte_level(**changes)))
    ids = tokenizer.encode(f"a{TURN}b  c")
    assert {len(tokens) - 2, len(tokens) - 1} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{TURN}b  c"
    assert tokenizer.decode(ids) == "ab  c"


PIECES = {
    "<unk>": 2, "<s>": 3, "</s>": 3, **{f"<0x{b:02X}>": 6 for b in range(256)},
    **dict.fromkeys(["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab"], 1), "<mark>": 4,
}  # fmt: skip
SCORES = {"ab": -2.0, "bc": -1.0, "abc": -5.0, "▁a": -3.0, "▁ab": -4.0}


def sentencepiece(**changes):
    metadata = {
        K + "model": "llama",
        K + "tokens": list(PIECES),
        K + "token_type": list(PIECES.values()),
        K + "scores": [SCORES.get(token, 0.0) for token in PIECES],
    }
    return {k: v for k, v in (metadata | {K + k: v for k, v in changes.items()}).items() if v is not None}


def best_joins(text):
    """SentencePiece's rule, spelled out: join the neighbours whose union scores best, the leftmost first."""
    pieces = list(text)
    while True:
        unions = [(SCORES[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in SCORES]
        if not unions:
            return pieces
        at = -max(unions)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("text", ["abc", "ab a", " ab", "aabcb abc", "a  b"])
def test_sentencepiece_merges_by_score(model, tmp_path, text):
    ids = list(PIECES)
    for prefix in (True, False):
        flag = {} if prefix else {"add_space_prefix": False}
        tokenizer = Tokenizer(opened(model, tmp_path, sentencepiece(**flag)))
        spaced = ("▁" if prefix else "") + text.replace(" ", "▁")
        found = tokenizer.encode(text)
        assert [ids[i] for i in found] == ["<s>", *best_joins(spaced)]
        assert tokenizer.decode(found) == text


class Cut(str):
    """A piece that remembers how often it was cut."""

    cuts = 0

    def __getitem__(self, part):
        Cut.cuts += 1
        return super().__getitem__(part)


def test_a_long_piece_is_cut_only_where_two_pieces_can_meet():
    pieces = [Cut(text) for text in ("a", "b", "aa", "aab", "a" * 10_000)]
    vocabulary = SimpleNamespace(tokens=pieces, ids={t: i for i, t in enumerate(pieces)}, types=[1] * len(pieces))
    merges = _merges_by_score({K + "scores": [0.0] * len(pieces)}, vocabulary)
    assert merges == [["a", "a"], ["aa", "b"]]
    assert Cut.cuts < 100


def test_sentencepiece_bytes_and_special_tokens(model, tmp_path):
    ids = list(PIECES)
    checkpoint = opened(model, tmp_path, sentencepiece(add_bos_token=False, add_eos_token=True, add_space_prefix=False))
    tokenizer = Tokenizer(checkpoint)
    assert [ids[i] for i in tokenizer.encode("aé<mark>a</s>")] == [
        "a", "<0xC3>", "<0xA9>", "<mark>", "a", "</s>", "</s>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("aé<mark>a</s>")) == "aé<mark>a"
    assert json.loads(checkpoint.assets["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(model="bert"), "tokenizer.ggml.model: expected 'gpt2' or 'llama', got 'bert'"),
        (byte_level(tokens=[f"t{i}" for i in range(500)]), "tokens: expected at most 384"),
        (byte_level(tokens=["a", "b", "a"], token_type=None), "token 'a' comes twice"),
        (byte_level(tokens="abc"), "tokens: expected an array"),
        (byte_level(tokens=[1, 2]), "tokens: expected an array of str"),
        (byte_level(tokens=None), "tokens: expected an array"),
        (byte_level(token_type=[1, 2]), "token_type: expected 376 values"),
        (byte_level(merges=["ab"]), "merges: expected two pieces"),
        (byte_level(merges=["a never-seen"]), "its tokenizer cannot be used: .*out of vocabulary"),
        (byte_level(merges=None), "merges: expected an array"),
        (byte_level(bos_token_id=(1 << 31) - 1), "bos_token_id: expected a token id from 0 to 9999999"),
        (byte_level(bos_token_id=380), "bos_token_id: expected an id below 376"),
        (byte_level(bos_token_id="first"), "bos_token_id: expected a token id"),
        (byte_level(add_bos_token="yes"), "add_bos_token: expected true or false"),
        (sentencepiece(scores=None), "scores: expected an array"),
        (sentencepiece(scores=[float("nan")] * len(PIECES)), "scores: expected finite numbers"),
    ],
)
def test_bad_vocabularies_are_one_line(model, tmp_path, metadata, message):
    with pytest.raises(InputError, match=rf"m\.gguf: .*{message}") as error:
        opened(model, tmp_path, metadata).assets["tokenizer.json"]
    assert str(error.value).isprintable()
