"""Tokenizers with the very pipelines of well-known models, trained on a few sentences: their vocabularies are small, their
rules for spaces are the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
_SENTENCES = [
    "Description: The cat sat on the mat, and the dog's house stood near it.",
    "Describe (in a few words): The restaurant serves pasta for 20 pounds.\nAnswer: The pasta is good.",
    "The cat likes the red house. The dog likes the blue house.\n\n12 + 30 = 42",
    "assistant\nThe cat said: [INST] hi [/INST] The end",
] * 4
_MARKERS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def gpt2() -> PreTrainedTokenizerFast:
    """Byte-level BPE, the space a part of the word behind it (GPT-2, OPT, GPT-NeoX)."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> PreTrainedTokenizerFast:
    """Llama 3: the same behind its own regular expression, digits in threes."""
    return _byte_level(_split(_LLAMA3))


def qwen2() -> PreTrainedTokenizerFast:
    """Qwen 2 and 3: digits one by one, NFC."""
    return _byte_level(_split(_QWEN2), normalizers.NFC())


def gemma() -> PreTrainedTokenizerFast:
    """Gemma 2 and 3: the space replaced by a mark, no text begins with one that isn't there; bytes as a last resort."""
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    before = pre_tokenizers.Split(" ", "merged_with_previous")
    return _pieces(normalizers.Replace(" ", "▁"), before, decoder)


def llama2() -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral as they were saved first (legacy): a space is put before every text, and decoding takes it away."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _pieces(normalizer, None, _STRIPPING)


def mistral() -> PreTrainedTokenizerFast:
    """The same, not legacy: a space before a text that begins without one."""
    return _pieces(None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False), _STRIPPING)


def t5() -> PreTrainedTokenizerFast:
    """T5: Unigram, a space before every text that begins without one."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    core.train_from_iterator(
        _SENTENCES,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


DECODERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    made.__name__: made for made in (gpt2, llama3, qwen2, gemma, llama2, mistral)
}
"""Of decoder-only models."""

_STRIPPING = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(
    before: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    if normalizer is not None:
        core.normalizer = normalizer
    core.pre_tokenizer = before
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        _SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=_MARKERS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrapped(core)


def _pieces(
    normalizer: normalizers.Normalizer | None, before: pre_tokenizers.PreTokenizer | None, decoder: decoders.Decoder
) -> PreTrainedTokenizerFast:
    """BPE pieces of whole words, as SentencePiece learns them, and a piece for every byte."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁?[^▁\n]+|▁"), "isolated")
    learner.train_from_iterator(
        [f" {sentence}" for sentence in _SENTENCES], trainers.BpeTrainer(vocab_size=600, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", *_MARKERS, *(f"<0x{number:02X}>" for number in range(256)), *learnt["vocab"]]
    core = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[(left, right) for left, right in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if normalizer is not None:
        core.normalizer = normalizer
    if before is not None:
        core.pre_tokenizer = before
    core.decoder = decoder
    return _wrapped(core)


def _wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in _MARKERS])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    unknown = {"unk_token": "<unk>"} if core.token_to_id("<unk>") is not None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        **unknown,
    )
