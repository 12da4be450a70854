"""Which tokens of an answer say what the prompt says, however the two are split."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import tiny
from cagsr.config import SalienceConfig
from cagsr.flow import Prompt
from cagsr.models.texts import TokenTexts, token_texts
from cagsr.prompts.encode import TextEncoder, encode_prompt
from cagsr.prompts.salience import DocumentFrequency, salient_words, words_of_tokens
from cagsr.reward.same_text import says
from test_models_texts import byte_level, sentencepiece_bpe


def split(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[str], list[str], Tensor]:
    """Tokens of prompt and answer, and whether one says the other, ``(answer, prompt)``."""
    given_prompt, salience = Prompt(1, prompt), SalienceConfig(weighting="uniform", skip_sink=False)
    tokens = encode_prompt(given_prompt, TextEncoder(tokenizer))
    words = salient_words(given_prompt, salience, DocumentFrequency.fit([given_prompt]), "here")
    encoded = words_of_tokens(given_prompt, tokens, words, salience, "here")
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    found = says(
        token_texts(tokenizer),
        torch.tensor([ids]),
        torch.ones(1, len(ids), dtype=torch.bool),
        torch.tensor([encoded.ids]),
        torch.tensor([encoded.words]),
    )
    return tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(list(encoded.ids)), found[0]


def pairs(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> set[tuple[str, str]]:
    said, asked, found = split(tokenizer, prompt, answer)
    return {(said[t], asked[j]) for t, j in found.nonzero().tolist()}


def test_a_word_split_differently_behind_a_bracket_is_said():
    tokenizer = byte_level("ĠPalace", "Pal", "ace", "ĠPal")
    assert tokenizer.tokenize("[Palace] Palace") == ["[", "Pal", "ace", "]", "ĠPalace"]
    assert pairs(tokenizer, "[Palace]", " a Palace.") == {("ĠPalace", "Pal"), ("ĠPalace", "ace")}
    # The other way round, in another case, with a sign behind it.
    assert tokenizer.tokenize("[palace]") == ["[", "p", "a", "l", "ace", "]"]
    assert pairs(tokenizer, "the Palace", "[palace]") == {(one, "ĠPalace") for one in ("p", "a", "l", "ace")}
    # A part of it is not the word, but a piece that it shares with the prompt's counts for that piece.
    assert pairs(tokenizer, "[Palace]", " Pal") == {("ĠPal", "Pal")}
    assert pairs(tokenizer, "the Palace", " Pal") == set()
    # Nor is a word that holds it.
    assert pairs(tokenizer, "the Palace", "[Palacean") == set()


def test_a_run_begins_and_ends_where_words_do():
    tokenizer = byte_level("Ġ20", "20")
    assert pairs(tokenizer, "x 20 y", "costs 20.") == {("Ġ20", "Ġ20")}
    assert pairs(tokenizer, "£20", " 20") >= {("Ġ20", "20")}
    # Piece by piece 20 is in 120, since the token is the same text; a run of 2 and 0 is not.
    single = byte_level()
    assert pairs(single, "1 20", " 20") == {(a, b) for a in "20" for b in "20"}
    many = byte_level("Ġ20")
    assert many.tokenize("x 20 120") == ["x", "Ġ20", "Ġ", "1", "2", "0"]
    assert pairs(many, "x 20", " 120") == set()
    assert pairs(many, "x 20", "(20)") == {("2", "Ġ20"), ("0", "Ġ20")}


def test_punctuation_and_space_within_a_word_say_nothing():
    tokenizer = byte_level("Ġfamily", "Ġfriendly", "family", "friendly")
    said = pairs(tokenizer, "family-friendly", " family friendly")
    assert said == {(a, b) for a in ("Ġfamily", "Ġfriendly") for b in ("family", "-", "friendly")}
    assert pairs(tokenizer, "family-friendly", " family") == {("Ġfamily", "family")}


def test_characters_in_pieces_are_joined_by_their_bytes():
    whole = byte_level("ĠCafÃ©", "Caf")
    assert whole.tokenize("[Café Café") == ["[", "Caf", "Ã", "©", "ĠCafÃ©"]
    assert pairs(whole, "[Café", " Café") == {("ĠCafÃ©", one) for one in ("Caf", "Ã", "©")}
    raw = sentencepiece_bpe()
    assert raw.tokenize("[é") == ["[", "<0xC3>", "<0xA9>"]
    assert ("<0xC3>", "<0xC3>") in pairs(raw, "[é", "-é")


def test_nothing_reaches_across_a_special_token_or_padding():
    tokenizer = byte_level("ĠPalace", "Pal", "ace")
    texts = token_texts(tokenizer)
    number = tokenizer.get_vocab()
    prompt, words = torch.tensor([[number["ĠPalace"]]]), torch.tensor([[0]])
    answer = torch.tensor(
        [[number["Pal"], number["<eos>"], number["ace"]], [number["Pal"], number["ace"], number["ace"]]]
    )
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = says(texts, answer, mask, prompt.expand(2, 1), words.expand(2, 1))[:, :, 0]
    assert found.tolist() == [[False, False, False], [True, True, False]]
    # Padding of prompts: words of -1, on either side.
    padded = torch.nn.functional.pad(prompt, (2, 1)), torch.nn.functional.pad(words, (2, 1), value=-1)
    wide = says(texts, answer, mask, padded[0].expand(2, 4), padded[1].expand(2, 4))
    assert torch.equal(wide[:, :, 2], found)
    assert not wide[:, :, [0, 1, 3]].any()


def test_a_tokenizer_of_whole_words():
    tokenizer = tiny.tokenizer()
    assert pairs(tokenizer, "the red cat", "red dog") == {("red", "red")}
    assert pairs(tokenizer, "a tree", "tree") == {("tree", "tree")}


def test_an_empty_answer_and_a_prompt_without_a_word():
    texts = token_texts(tiny.tokenizer())
    ids = torch.tensor([[5, 6]])
    none = torch.zeros(1, 0, dtype=torch.int64)
    assert says(texts, none, none.bool(), ids, torch.zeros_like(ids)).shape == (1, 0, 2)
    assert not says(texts, ids, torch.ones_like(ids, dtype=torch.bool), ids, torch.full_like(ids, -1)).any()


def plainly(
    texts: TokenTexts, strings: list[str], raw: list[str], response: list[int], prompt: list[int], words: list[int]
):
    """The same with strings and loops."""
    found = torch.zeros(len(response), len(prompt), dtype=torch.bool)
    for t, said in enumerate(response):
        for j, asked in enumerate(prompt):
            found[t, j] = words[j] >= 0 and texts.ids[said] == texts.ids[asked]
    for word in {one for one in words if one >= 0}:
        first = words.index(word)
        last = first
        while last + 1 < len(words) and words[last + 1] == word:
            last += 1
        wanted = "".join(strings[number] for number in prompt[first : last + 1])
        for start in range(len(response)):
            for end in range(start, len(response)):
                run = response[start : end + 1]
                opened = start == 0 or not raw[run[0]][0].isalnum() or not raw[response[start - 1]][-1].isalnum()
                closed = (
                    end + 1 == len(response)
                    or not raw[run[-1]][-1].isalnum()
                    or not raw[response[end + 1]][0].isalnum()
                )
                bare = strings[run[0]] and strings[run[-1]]
                if wanted and bare and opened and closed and "".join(strings[number] for number in run) == wanted:
                    for j, one in enumerate(words):
                        if one == word:
                            found[start : end + 1, j] = True
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_it_is_what_strings_and_loops_give(seed: int):
    """On random tokens of a byte-level vocabulary, ASCII only, and random words."""
    tokenizer = byte_level("Ġab", "ab", "ba", "Ġ-", "[a", "abba", "Ġb")
    pool = [
        tokenizer.get_vocab()[one]
        for one in ("a", "b", "A", "Ġa", "Ġab", "ab", "ba", "Ġ", "-", "Ġ-", "[a", "abba", "Ġb")
    ]
    raw = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    strings = [text.strip(" -[").lower() for text in raw]
    texts = token_texts(tokenizer)
    g = torch.Generator().manual_seed(seed)
    response, prompt = ([pool[i] for i in torch.randint(len(pool), (n,), generator=g)] for n in (9, 7))
    # Words as words_of_tokens gives them: runs of an index, each index in one place, -1 between.
    words, index = [], -1
    for draw in torch.randint(0, 4, (len(prompt),), generator=g).tolist():
        index += draw != 1 and (draw == 0 or not words or words[-1] < 0)
        words.append(-1 if draw == 1 else index)
    expected = plainly(texts, strings, raw, response, prompt, words)
    ids, asked = torch.tensor([response]), torch.tensor([prompt])
    found = says(texts, ids, torch.ones_like(ids, dtype=torch.bool), asked, torch.tensor([words]))
    assert torch.equal(found[0], expected)
