"""The tokenizer of a GGUF file, from the file's own metadata: tokenizer.json, its config, the chat template.

Sources: the GGUF specification for the keys; for what a key means where it is silent, llama.cpp's vocabulary loader
(src/llama-vocab.cpp), which is what GGUF files are made for.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from depthprune_runtime.checkpoint.assets import LazyAssets, check_token_id, one_line
from depthprune_runtime.checkpoint.base import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from depthprune_runtime.checkpoint.gate import reading
from depthprune_runtime.checkpoint.gguf_pre_tokenizers import pre_tokenizer
from depthprune_runtime.errors import InputError, printable

_log = logging.getLogger("depthprune_runtime")
_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# control tokens that end an output whether or not a key names them, as in llama.cpp: converters name but one
_END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
    "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>",
})  # fmt: skip
_TEMPLATE_KEY = "tokenizer.chat_template"  # of the default one; of the others with .NAME behind it
_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # where the file names none
_SPACE = "\u2581"


def _list(metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> list[Any]:
    """Array `tokenizer.ggml.name` of `kind`."""
    values = metadata.get(_KEY + name)
    if not isinstance(values, list) or not values or not all(type(v) is kind for v in values):
        raise InputError(f"{_KEY}{name}: expected an array of {kind.__name__}, got something else")
    if length is not None and len(values) != length:
        raise InputError(f"{_KEY}{name}: expected {length} values, one a token, got {len(values)}")
    return values


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_KEY + name, default)
    if not isinstance(value, bool):
        raise InputError(f"{_KEY}{name}: expected true or false, got {printable(repr(value))}")
    return value


class _Vocabulary:
    """Tokens, their types, and the ids of the special ones."""

    def __init__(self, metadata: Mapping[str, Any], vocab_size: int) -> None:
        texts = _list(metadata, "tokens", str)
        if len(texts) > vocab_size:
            raise InputError(
                f"{_KEY}tokens: expected at most {vocab_size}, the rows of the embedding, got {len(texts)}"
            )
        self.tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise InputError(f"{_KEY}tokens: token {printable(repr(twice))} comes twice")
        self.types = [_NORMAL] * len(texts)
        if _KEY + "token_type" in metadata:
            self.types = _list(metadata, "token_type", int, len(texts))

    def special(self, metadata: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, str]:
        """`bos_token` and so on -> its text."""
        found = {}
        for name, key in _SPECIAL_IDS.items():
            default = defaults.get(key)
            value = metadata.get(_KEY + key, default if default is not None and default < len(self.tokens) else None)
            if value is not None:
                found[name] = self.tokens[_special_id(value, key, len(self.tokens))]
        return found

    def added(self, sentencepiece: bool) -> list[dict[str, Any]]:
        """Tokens that are taken out of a text whole: control tokens, and those the model's makers defined."""
        whole = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": index, "content": self.tokens[index], **flags, "special": whole[kind]}
            for index, kind in enumerate(self.types)
            if kind in whole and (sentencepiece or kind != _UNKNOWN)
        ]


def _special_id(value: object, key: str, count: int) -> int:
    token = check_token_id(value, _KEY + key)
    if token >= count:
        raise InputError(f"{_KEY}{key}: expected an id below {count}, got {token}")
    return token


def _template(vocabulary: _Vocabulary, before: list[str], after: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts special tokens around a text."""
    if not before and not after:
        return None
    around = {token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]} for token in before + after}

    def of(sequence: str, type_id: int) -> list[dict[str, Any]]:
        marks = [[{"SpecialToken": {"id": t, "type_id": type_id}} for t in tokens] for tokens in (before, after)]
        return [*marks[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *marks[1]]

    return {
        "type": "TemplateProcessing",
        "single": of("A", 0),
        "pair": of("A", 0) + of("B", 1),
        "special_tokens": around,
    }


def _merges(metadata: Mapping[str, Any]) -> list[list[str]]:
    found = []
    for merge in _list(metadata, "merges", str):
        split = merge.find(" ", 1)  # a piece may begin with a space, none is empty
        if split < 0:
            raise InputError(f"{_KEY}merges: expected two pieces with a space between, got {printable(repr(merge))}")
        found.append([merge[:split], merge[split + 1 :]])
    return found


def _merges_by_score(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> list[list[str]]:
    """SentencePiece joins the two neighbours whose union scores best: the same as merges in order of score."""
    scores = _list(metadata, "scores", float, len(vocabulary.tokens))
    if not all(map(math.isfinite, scores)):
        raise InputError(f"{_KEY}scores: expected finite numbers")
    plain = {t: i for t, i in vocabulary.ids.items() if vocabulary.types[i] in (_NORMAL, _UNUSED)}
    lengths = {len(token) for token in plain}  # a token of a million characters is not cut at each of them
    found = []
    for token, index in plain.items():
        cuts = [i for i in lengths if len(token) - i in lengths]
        pairs = ((token[:i], token[i:]) for i in cuts)
        known = sorted((plain[a], plain[b], a, b) for a, b in pairs if a in plain and b in plain)
        found += [(-scores[index], index, order, a, b) for order, (_, _, a, b) in enumerate(known)]
    found.sort(key=lambda merge: merge[:3])
    return [[a, b] for *_, a, b in found]


def _bpe(vocabulary: _Vocabulary, merges: list[list[str]], **options: Any) -> dict[str, Any]:
    plain = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE", **plain, **options, "vocab": vocabulary.ids, "merges": merges}


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> tuple[dict[str, Any], bool]:
    """Parts of tokenizer.json of a byte-level vocabulary; whether BOS is added where the file does not say."""
    pre = metadata.get(_KEY + "pre")
    if pre is None:
        _log.warning(
            "%s: it does not say how text is split before tokenising (tokenizer.ggml.pre); llama.cpp's default is "
            "used, which is not every model's; convert the model anew if its outputs are poor",
            where,
        )
        pre = "default"
    rule = pre_tokenizer(pre)
    if _flag(metadata, "add_space_prefix", False):
        _log.warning("%s: add_space_prefix is not applied: byte-level vocabularies take none, as in llama.cpp", where)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in rule.regexes
    ]
    parts = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": _bpe(vocabulary, _merges(metadata), ignore_merges=rule.ignore_merges),
    }
    return parts, rule.add_bos


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary, unknown: str | None) -> dict[str, Any]:
    prefix = _flag(metadata, "add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, spaces] if prefix else [spaces]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocabulary,
            _merges_by_score(metadata, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _chat_template(metadata: Mapping[str, Any], key: str) -> str:
    """Template `key`, empty where there is none: another type of value would leave the model without it."""
    value = metadata.get(key, "")
    if not isinstance(value, str):
        kind = f"an array of {len(value)}" if isinstance(value, list) else printable(repr(value))
        raise InputError(f"{key}: expected a text, got {kind}")
    return value


def _named_templates(metadata: Mapping[str, Any]) -> list[dict[str, str]]:
    """All chat templates but the default one, as a tokenizer's config lists them."""
    keys = (key for key in metadata if key.startswith(_TEMPLATE_KEY + "."))
    found = {key.removeprefix(_TEMPLATE_KEY + "."): _chat_template(metadata, key) for key in keys}
    return [{"name": name, "template": text} for name, text in found.items() if text]


def _tokenizer_files(metadata: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, bytes]:
    kind = metadata.get(_KEY + "model")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{_KEY}model: expected 'gpt2' or 'llama', got {printable(repr(kind))}")
    sentencepiece = kind == "llama"
    vocabulary = _Vocabulary(metadata, vocab_size)
    special = vocabulary.special(metadata, _SENTENCEPIECE_IDS if sentencepiece else {})
    if sentencepiece:
        parts, add_bos = _sentencepiece(metadata, vocabulary, special.get("unk_token")), True
    else:
        parts, add_bos = _byte_level(metadata, vocabulary, where)
    adds = {
        "bos_token": _flag(metadata, "add_bos_token", add_bos),
        "eos_token": _flag(metadata, "add_eos_token", False),
    }
    before, after = ([special[name]] if wanted and name in special else [] for name, wanted in adds.items())
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(sentencepiece),
        "post_processor": _template(vocabulary, before, after),
        **parts,
    }
    text = json.dumps(content, ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"its tokenizer cannot be used: {one_line(error)}") from error
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": adds["bos_token"],
        "add_eos_token": adds["eos_token"],
        "clean_up_tokenization_spaces": False,
    }
    if others := _named_templates(metadata):
        config["chat_template"] = others
    return {TOKENIZER_FILE: text.encode(), TOKENIZER_CONFIG_FILE: json.dumps(config, ensure_ascii=False).encode()}


def _end_tokens(metadata: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Ids of the control tokens that are `_END_TEXTS`; none of a vocabulary that cannot be used."""
    texts, types = (metadata.get(_KEY + name) for name in ("tokens", "token_type"))
    if not isinstance(texts, list) or not isinstance(types, list):
        return []
    pairs = enumerate(zip(texts[:vocab_size], types, strict=False))
    return [i for i, (text, kind) in pairs if kind == _CONTROL and text in _END_TEXTS]


def _generation_config(metadata: Mapping[str, Any], vocab_size: int) -> bytes:
    defaults = _SENTENCEPIECE_IDS if metadata.get(_KEY + "model") == "llama" else {}

    def identifier(key: str) -> int | None:
        value = metadata.get(_KEY + key, defaults.get(key))
        return None if value is None else _special_id(value, key, vocab_size)

    begin = identifier("bos_token_id")
    named = [i for key in _END_IDS if (i := identifier(key)) is not None]
    ends = list(dict.fromkeys(named + _end_tokens(metadata, vocab_size)))
    config: dict[str, Any] = {} if begin is None else {"bos_token_id": begin}
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return json.dumps(config).encode()


def gguf_assets(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> LazyAssets:
    """Tokenizer files and generation config from the metadata of `path`; empty for a file of weights alone.

    vocab_size: rows of the embedding, which no token id may reach.
    """
    if metadata.get(_KEY + "model") in (None, "no_vocab", "none"):
        return LazyAssets({})
    files: dict[str, bytes] = {}

    def tokenizer_file(name: str) -> Callable[[], bytes]:
        def make() -> bytes:
            if not files:
                with reading(path):
                    files.update(_tokenizer_files(metadata, vocab_size, str(path)))
            return files[name]

        return make

    def template() -> bytes:
        with reading(path):
            return _chat_template(metadata, _TEMPLATE_KEY).encode()

    def generation() -> bytes:
        with reading(path):
            return _generation_config(metadata, vocab_size)

    makers = {name: tokenizer_file(name) for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)}
    if metadata.get(_TEMPLATE_KEY, "") != "":
        makers[CHAT_TEMPLATE_FILE] = template
    makers[GENERATION_CONFIG_FILE] = generation
    return LazyAssets(makers)
