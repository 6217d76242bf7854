"""Small tokenizers of every kind that models come with."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_WORDS = ["hello", "world", "naïve", "東京", "é", "a", "b", "ab", ".", ",", "🙂", "the", "ing", "▁"]
_SPECIAL = ["<s>", "</s>", "<|end|>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen: every token is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(_WORDS)] * 8, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2, Mistral: BPE of characters; what is not in the vocabulary is bytes, `<0xE2>` each."""
    texts = ["▁hello", "▁world", "▁a", "lo", "é", "東", "b", "▁", "▁▁", "a", ".", "�"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *_BYTES, *texts, *"helwordn"])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("l", "o")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """BPE of words that carry their space, by the decoder of that name."""
    texts = ["▁hello", "▁world", "▁a", "▁", "a", "b", "é", "lo", "."]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(["<unk>", *texts])}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece's other model, with byte fallback."""
    texts = [*_BYTES, "▁hello", "▁world", "▁", "a", "b", "東", "lo"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((t, -1.0 - i) for i, t in enumerate(texts))], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's: a token without `##` begins a word, and some marks lose the space before them."""
    texts = ["hello", "world", "##s", "##ing", "a", "b", "##b", ".", ",", "'", "##", "東"]
    tokenizer = Tokenizer(models.WordPiece(vocab={t: i for i, t in enumerate(["[UNK]", *texts])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def word_ends() -> Tokenizer:
    """The first BPE: a token says whether it ends a word, so its text depends on the next one."""
    texts = ["hello</w>", "world</w>", "a", "b", "a</w>", ".</w>", "</w>"]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(texts)}, merges=[], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return tokenizer


def no_decoder() -> Tokenizer:
    """Tokens joined by spaces."""
    tokenizer = Tokenizer(
        models.WordLevel(vocab={"<unk>": 0, "hello": 1, "world": 2, "": 3, ".": 4}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    f.__name__: f for f in (byte_level, byte_fallback, metaspace, unigram, word_piece, word_ends, no_decoder)
}


def build(kind: str) -> Tokenizer:
    """A tokenizer of this kind with special tokens, a beginning that is added, and a marker that is not special."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer
