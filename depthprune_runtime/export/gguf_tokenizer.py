"""A GGUF file's tokenizer from tokenizer.json: byte-level vocabularies, and SentencePiece's with byte fallback."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers
from gguf import GGUFWriter, TokenType

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.assets import one_line
from depthprune_runtime.checkpoint.base import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from depthprune_runtime.checkpoint.gate import parse_object
from depthprune_runtime.checkpoint.gguf_pre_tokenizers import BYTE_LEVEL, rule_name
from depthprune_runtime.errors import InputError, printable

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_UNMERGED = -1e6  # score of a token that no merge makes
_ROLES = ("bos", "eos", "unk", "pad")
_END_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


class _Source:
    """The parts of a tokenizer.json and of the files beside it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        def read(name: str) -> dict[str, Any]:
            stored = checkpoint.assets.get(name)
            # tokenizer configs hold 10**30 where no length is known
            return {} if stored is None else parse_object(stored, f"{checkpoint.name}: {name}", integer_bits=128)

        self.name = checkpoint.name
        self.content = read(TOKENIZER_FILE)
        self.config = read(TOKENIZER_CONFIG_FILE)
        self.generation = read(GENERATION_CONFIG_FILE)
        template = checkpoint.assets.get(CHAT_TEMPLATE_FILE)
        stored = self.config.get("chat_template")
        self.template = template.decode() if template is not None else stored if isinstance(stored, str) else None
        self.model: dict[str, Any] = self.content["model"]
        self.added: list[dict[str, Any]] = self.content.get("added_tokens") or []
        self.ids: dict[str, int] = {**self.model.get("vocab", {}), **{t["content"]: t["id"] for t in self.added}}
        self.raw = tokenizers.Tokenizer.from_str(json.dumps(self.content))

    def steps(self) -> list[dict[str, Any]]:
        """Pre-tokenizers in order."""
        found = self.content.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
        return list(found["pretokenizers"]) if found["type"] == "Sequence" else [found]

    def refuse(self, what: str) -> InputError:
        return InputError(
            f"{self.name}: its tokenizer cannot be told in GGUF: {what}; --to hf keeps the tokenizer as it is"
        )

    def special(self, role: str) -> int | None:
        """Id of the token that `tokenizer_config.json` names for `role`."""
        token = self.config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        return self.ids.get(text) if isinstance(text, str) else None

    def ends(self) -> list[int]:
        """Ids that end an output, the tokenizer's own first."""
        stored = self.generation.get("eos_token_id")
        listed = [i for i in (stored if isinstance(stored, list) else [stored]) if isinstance(i, int)]
        own = self.special("eos")
        first = [] if own is None or (listed and own not in listed) else [own]
        return list(dict.fromkeys([*first, *listed]))


def _merges(source: _Source) -> list[tuple[str, str]]:
    found = []
    for merge in source.model.get("merges", []):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _regexes(source: _Source) -> list[str]:
    """How text is split before merges, as regular expressions in turn."""
    found = []
    for step in source.steps():
        kind = step["type"]
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise source.refuse("it puts a space before a text")
            found += [BYTE_LEVEL] if step.get("use_regex", True) else []
        elif kind == "Digits":
            found.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated":
            found.append(step["pattern"]["Regex"])
        else:
            raise source.refuse(f"a pre-tokenizer of kind {printable(repr(kind))}")
    return found


def _types(source: _Source, count: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Texts and types of `count` tokens; ids that the tokenizer leaves out are padding."""
    texts = [f"[PAD{index}]" for index in range(count)]
    types = [int(TokenType.UNUSED)] * count
    for token, index in source.ids.items():
        if not 0 <= index < count:
            raise source.refuse(f"token {printable(repr(token))} has id {index}, the embedding {count} rows")
        texts[index] = token
        byte = sentencepiece and _BYTE_TOKEN.fullmatch(token) is not None
        types[index] = int(TokenType.BYTE if byte else TokenType.NORMAL)
    for added in source.added:
        types[added["id"]] = int(TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED)
    unknown = source.special("unk")
    if sentencepiece and unknown is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    return texts, types


def _scores(source: _Source, texts: list[str]) -> list[float]:
    """SentencePiece joins the neighbours whose union scores best: earlier merges score better."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(source)):
        ranks.setdefault(left + right, rank)
    return [float(-ranks[text] - 1) if text in ranks else _UNMERGED for text in texts]


def _adds_prefix(source: _Source) -> bool:
    """Whether a space is put before a text."""
    normalizer = source.content.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    spaces = [step for step in source.steps() if step["type"] == "Metaspace"]
    return any(part.get("type") == "Prepend" for part in parts) or any(
        step.get("prepend_scheme", "always") != "never" for step in spaces
    )


def _add_special(writer: GGUFWriter, source: _Source) -> None:
    ends = source.ends()
    for role in _ROLES:
        index = source.special(role)
        if role == "eos" and ends:
            index = ends[0]
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    for key, index in zip(_END_KEYS, ends[1:], strict=False):
        writer.add_uint32(key, index)
    ids = source.raw.encode("a").ids
    begin, end = source.special("bos"), source.special("eos")
    writer.add_add_bos_token(begin is not None and ids[:1] == [begin])
    writer.add_add_eos_token(end is not None and ids[-1:] == [end])


def add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Tokenizer and chat template of `checkpoint`; a mark that there is none where it has none.

    Raises InputError for a tokenizer that llama.cpp would not split text with as its own code does.
    """
    if TOKENIZER_FILE not in checkpoint.assets:
        writer.add_tokenizer_model("no_vocab")
        return
    try:
        source = _Source(checkpoint)
        if source.model.get("type", "BPE") != "BPE":
            raise source.refuse(f"expected a BPE model, got {printable(repr(source.model['type']))}")
        sentencepiece = bool(source.model.get("byte_fallback"))
        texts, types = _types(source, checkpoint.spec.vocab_size, sentencepiece)
        if sentencepiece:
            writer.add_tokenizer_model("llama")
            writer.add_token_scores(_scores(source, texts))
            writer.add_add_space_prefix(_adds_prefix(source))
        else:
            rule = rule_name(_regexes(source), bool(source.model.get("ignore_merges")))
            if rule is None:
                raise source.refuse("it splits text in a way that has no name there")
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(rule)
            writer.add_token_merges([f"{left} {right}" for left, right in _merges(source)])
        writer.add_token_list(texts)
        writer.add_token_types(types)
        _add_special(writer, source)
        if source.template is not None:
            writer.add_chat_template(source.template)
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception; a damaged file anything
        raise InputError(f"{checkpoint.name}: its tokenizer cannot be told in GGUF: {one_line(error)}") from error
