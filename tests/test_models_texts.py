"""Which tokens say the same, on tokenizers built as the real ones are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from cagsr.config import AttentionConfig, ModelConfig, RewardConfig, SalienceConfig
from cagsr.flow import Prompt
from cagsr.models.load import load_model
from cagsr.models.texts import token_texts
from cagsr.prompts.encode import TextEncoder, encode_prompt
from cagsr.prompts.salience import DocumentFrequency, salient_words, words_of_tokens
from cagsr.reward.answers import AnswerScorer
from cagsr.scoring.answers import answered, encode_response

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def bpe(pieces: list[str]) -> Tokenizer:
    """A BPE that makes these pieces, letter by letter, the first of them first."""
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *dict.fromkeys(pieces)])}
    merges = [(piece[:-1], piece[-1]) for piece in dict.fromkeys(pieces) if len(piece) > 1 and piece[:-1] in vocabulary]
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges))


def steps(*words: str) -> list[str]:
    """Every letter and every beginning of each word: what a BPE needs to make them."""
    beginnings = [word[:end] for word in words for end in range(2, len(word) + 1)]
    return [*dict.fromkeys("".join(words)), *beginnings]


def wrapped(core: Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", **settings
    )


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Llama 2 and Gemma: ▁ for the space, bytes for what has no piece."""
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [
        *SPECIAL,
        *raw,
        *dict.fromkeys(["▁", "[", "]", ",", "-", "▁-", *steps("The", "▁The", "▁the", "20", "£", "▁£")]),
    ]
    core = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(vocabulary)},
            merges=[
                ("▁", "T"),
                ("▁", "t"),
                ("▁T", "h"),
                ("▁t", "h"),
                ("▁Th", "e"),
                ("▁th", "e"),
                ("T", "h"),
                ("Th", "e"),
            ],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(core)


def byte_level(*words: str) -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3 and Qwen: Ġ for the space, every other character as its bytes; ``words`` have pieces of their own."""
    core = bpe(
        [
            *sorted(pre_tokenizers.ByteLevel.alphabet()),
            *steps(*words, "ĠThe", "Ġthe", "The", "Ġ-", "ĠðŁ", "ðŁ", "âĤ", "âĢ"),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(core)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT: ## for a piece that goes on."""
    pieces = [*SPECIAL, "The", "the", "##the", "sing", "##ing", "ing", "-", "##-", "[", "]"]
    core = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return wrapped(core)


def unigram() -> PreTrainedTokenizerFast:
    """T5 and XLM-R: Unigram with ▁."""
    pieces = [*SPECIAL, "▁", "▁The", "The", "▁the", "the", "[", "▁-", "-", "5", "▁5"]
    core = Tokenizer(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return wrapped(core)


def glued() -> PreTrainedTokenizerFast:
    """Llama 3, Qwen and GPT-4: a sign before a word may be part of its first piece."""
    core = bpe([*sorted(pre_tokenizers.ByteLevel.alphabet()), *steps("[The", "ĠThe", "The,", "(the")])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(core)


KINDS = {
    glued: [("[The", "ĠThe", "The", "The,", "(the")],
    sentencepiece_bpe: [("The", "▁The", "▁the"), ("£", "▁£"), ("T", "▁T", "t", "▁t", "<0x54>", "<0x74>")],
    byte_level: [("The", "ĠThe", "Ġthe"), ("ðŁ", "ĠðŁ"), ("T", "ĠT", "t", "Ġt")],
    wordpiece: [("The", "the", "##the"), ("ing", "##ing")],
    unigram: [("The", "▁The", "the", "▁the"), ("5", "▁5")],
}
ALONE = {
    glued: ["[", "(", ",", *SPECIAL],
    sentencepiece_bpe: ["▁", "-", "▁-", "[", "]", "<0xE2>", "<0x82>", "<0x20>", "<0x0A>", *SPECIAL],
    byte_level: ["Ġ", "-", "Ġ-", "âĤ", "âĢ", "Ċ", "ł", *SPECIAL],
    wordpiece: ["-", "##-", "[", "sing", *SPECIAL],
    unigram: ["▁", "-", "▁-", "[", *SPECIAL],
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_same_text_has_one_id_and_all_else_its_own(kind):
    tokenizer = kind()
    found = token_texts(tokenizer).ids
    number = tokenizer.get_vocab()
    assert len(found) == len(tokenizer)
    for group in KINDS[kind]:
        together = {int(found[number[piece]]) for piece in group}
        assert together == {min(number[piece] for piece in group)}, group
        same = (found == together.pop()).nonzero().flatten().tolist()
        assert set(tokenizer.convert_ids_to_tokens(same)) == set(group)
    for piece in ALONE[kind]:
        assert (found == number[piece]).nonzero().flatten().tolist() == [number[piece]], piece


def test_unfinished_characters_are_compared_by_their_bytes():
    tokenizer = byte_level()
    found = token_texts(tokenizer).ids
    # All of these decode to the replacement character.
    single = [
        piece
        for piece in sorted(pre_tokenizers.ByteLevel.alphabet())
        if tokenizer.decode(tokenizer.get_vocab()[piece]) == "\ufffd"
    ]
    assert len(single) == 128
    assert len({int(found[tokenizer.get_vocab()[piece]]) for piece in single}) == 128


def test_special_and_unknown_ids_say_nothing_that_others_say():
    tokenizer = unigram()
    # Special tokens whose text is a word, one of them known to nobody but the list of added tokens.
    tokenizer.add_special_tokens({"additional_special_tokens": ["the"]})
    tokenizer.add_tokens([AddedToken("The ", special=True), AddedToken("THE", normalized=False)])
    number = tokenizer.get_vocab()
    found = token_texts(tokenizer, size=len(tokenizer) + 3).ids
    assert len(found) == len(tokenizer) + 3
    assert found[-3:].tolist() == [len(tokenizer), len(tokenizer) + 1, len(tokenizer) + 2]  # padding of the vocabulary
    for piece in ("the", "The "):
        assert int((found == number[piece]).sum()) == 1
    assert found[number["THE"]] == found[number["▁the"]] == number["▁The"]


def test_a_word_tokenizer_without_decoder():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["Cat"])
    found = token_texts(tokenizer).ids
    assert found[tokenizer.convert_tokens_to_ids("Cat")] == tokenizer.convert_tokens_to_ids("cat")
    assert found[:-1].tolist() == list(range(len(found) - 1))


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random Llama with this tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = tiny.config("llama")
    settings.vocab_size = len(tokenizer) + 5
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [sentencepiece_bpe, byte_level], ids=lambda kind: kind.__name__)
def test_what_is_copied_from_behind_a_bracket_is_seen(kind, tmp_path):
    loaded = load_model(ModelConfig(str(saved(tmp_path, kind())), device="cpu"), for_training=False)
    prompt = Prompt(1, "[The]")
    salience = SalienceConfig(weighting="uniform", skip_sink=False)
    tokens = encode_prompt(prompt, TextEncoder(loaded.tokenizer))
    chosen = salient_words(prompt, salience, DocumentFrequency.fit([prompt]), "here")
    encoded = words_of_tokens(prompt, tokens, chosen, salience, "here")
    said = [encode_response(loaded, encoded, text, ended=False) for text in (" The", " the", "The", "]")]
    asked, answers = encoded.ids[encoded.words.index(0)], [one.ids[0] for one in said]
    assert [len(one.ids) for one in said] == [1, 1, 1, 1]
    assert [answer == asked for answer in answers] == [False, False, True, False]  # by id only the third copies

    scorer = AnswerScorer(loaded, RewardConfig(), AttentionConfig(layers="all"), salience)
    assert len(scorer.loaded.texts.ids) == len(loaded.tokenizer) + 5  # ids of the padding can be said too
    batch = scorer.batch(answered(loaded, [encoded] * 4, said))
    values = scorer.values(batch)
    place = (batch.episodes.prompts.words[0] == 0).nonzero().flatten()
    assert batch.attention is not None
    looked = batch.attention.maps[:3, 0, place].flatten()
    assert (looked > 0).all()
    tau = scorer.config.grounded_coverage.threshold
    assert values["grounded_coverage"].tolist() == pytest.approx([*(looked / tau).clamp(max=1).tolist(), 0.0])
    assert values["copy_coverage"].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_a_vocabulary_as_large_as_real_ones_is_read_in_seconds():
    pieces = [
        *SPECIAL,
        *(f"{mark}{word}{number}" for number in range(22_000) for mark in ("", "▁") for word in ("w", "W")),
    ]
    core = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = wrapped(core)
    started = time.process_time()
    found = token_texts(tokenizer).ids
    assert time.process_time() - started < 5  # a third of a second on a quiet core
    assert len(found.unique()) == len(SPECIAL) + 22_000
