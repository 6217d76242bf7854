"""How text is split before its pieces are merged, by GGUF's `tokenizer.ggml.pre`.

Source: the table of llama.cpp (src/llama-vocab.cpp), with the regular expressions as the models' own tokenizer.json
spell them. A text is split by each expression in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from depthprune_runtime.errors import InputError, printable


@dataclass(frozen=True)
class PreTokenizer:
    """regexes: applied in order; ignore_merges: a piece that is a token is taken whole; add_bos: unless the file says
    otherwise."""

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_OTHER}{_UPPER}*{_LOWER}+|{_OTHER}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_GPT4O = (
    rf"{_OTHER}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_OTHER}{_UPPER}+{_LOWER}*{_ENDINGS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _TAIL
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

_RULES: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    ),
    PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe"),
    PreTokenizer((_QWEN2,)): (
        "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "f2llmv2", "stablelm2", "hunyuan", "solar-open", "grok-2",
    ),
    PreTokenizer((_GPT2,)): (
        "gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "olmo", "mpt", "jais", "trillion",
    ),
    PreTokenizer((r"\p{N}", _GPT2)): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
    ),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): ("falcon",),
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "llama4", "kanana2"),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")): ("deepseek-coder",),
    PreTokenizer((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)): ("deepseek-v3", "hunyuan-dense"),
}  # fmt: skip
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names}


BYTE_LEVEL = _GPT2  # what the tokenizers library's ByteLevel splits by


def rule_name(regexes: Sequence[str], ignore_merges: bool) -> str | None:
    """A name of the rule that splits by `regexes` in turn, one that llama.cpp knows; None where it has none."""
    fitting = [(rule, names[0]) for rule, names in _RULES.items() if rule.regexes == tuple(regexes)]
    for rule, name in fitting:
        if rule.ignore_merges == ignore_merges:
            return name
    return None


def pre_tokenizer(name: object) -> PreTokenizer:
    """The rule called `name`. Raises InputError for one that is not known, since another would split otherwise."""
    rule = _BY_NAME.get(name) if isinstance(name, str) else None
    if rule is None:
        raise InputError(
            f"tokenizer.ggml.pre: {printable(repr(name))} is not known (known are {', '.join(sorted(_BY_NAME))}); "
            "import the model from its Hugging Face folder"
        )
    return rule
