"""Words, IDF, and which token belongs to which salient word: numbers worked out by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from cagsr.config import SalienceConfig
from cagsr.errors import DataError, ModelError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.prompts.encode import TextEncoder, encode_prompt, truncate_prompt
from cagsr.prompts.find_words import find_words
from cagsr.prompts.salience import DocumentFrequency, explain_salience, salient_words, words_of_tokens
from prompts_tokenizers import byte_bpe, tiny_stories, word_level

UNIFORM = SalienceConfig(weighting="uniform", skip_sink=False)


def encode(prompt: Prompt | str, tokenizer, config: SalienceConfig = UNIFORM, frequency=None) -> EncodedPrompt:
    prompt = Prompt(row=1, text=prompt) if isinstance(prompt, str) else prompt
    tokens = encode_prompt(prompt, TextEncoder(tokenizer))
    frequency = frequency or DocumentFrequency.fit([prompt])
    return words_of_tokens(prompt, tokens, salient_words(prompt, config, frequency, "f, row 1"), config, "f, row 1")


def pieces(encoded: EncodedPrompt, tokenizer) -> dict[int, str]:
    """Word index -> the text of all its tokens."""
    found: dict[int, str] = {}
    for word, token in zip(encoded.words, encoded.ids, strict=True):
        if word >= 0:
            found[word] = found.get(word, "") + tokenizer.decode([token])
    return found


# ---- words ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, ice-cream!", ["don't", "stop", "ice-cream"]),
        ("priceRange[£20-25], 3.5 or 1,000.", ["pricerange", "£20-25", "3.5", "or", "1,000"]),
        ("has_close(x): 50% -- 'so'", ["has_close", "x", "50%", "so"]),
        ("don’t", ["don't"]),
        ("猫が好き", ["猫", "が", "好", "き"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("Straße CAFÉ", ["strasse", "café"]),
        ("?! --- []", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert [word.key for word in find_words(text)] == words


def test_words_stay_outside_the_template() -> None:
    text = "userHello there"  # the template wrote "user" directly before the content
    assert [(w.start, w.key) for w in find_words(text, [(0, 4)])] == [(4, "hello"), (10, "there")]


@given(st.text(max_size=60))
def test_words_are_in_order_and_do_not_overlap(text: str) -> None:
    words = list(find_words(text))
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert all(word.start < word.end and regex.search(r"[\p{L}\p{N}]", text[word.start : word.end]) for word in words)


# ---- IDF ----


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(row=i, text=text) for i, text in enumerate(texts, start=1)]


def test_idf_by_hand() -> None:
    frequency = DocumentFrequency.fit(prompts("the cat cat", "The dog", "the bird", "a dog"))
    assert frequency.documents == 4
    assert dict(frequency.counts) == {"the": 3, "cat": 1, "dog": 2, "bird": 1, "a": 1}
    assert frequency.idf("the") == pytest.approx(0.5108256)  # ln(5 / 3)
    assert frequency.idf("dog") == pytest.approx(0.9162907)  # ln(5 / 2)
    assert frequency.idf("cat") == pytest.approx(1.6094379)  # ln 5
    assert frequency.idf("never seen") == frequency.largest == pytest.approx(math.log(5))


def test_idf_floor_is_relative_to_the_largest() -> None:
    frequency = DocumentFrequency.fit(prompts("the cat cat", "the dog", "the bird", "a dog"))
    # 0.5108 / 1.6094 = 0.317, 0.9163 / 1.6094 = 0.569
    assert frequency.boilerplate(0.31) == []
    assert frequency.boilerplate(0.33) == ["the"]
    assert frequency.boilerplate(0.6) == ["the", "dog"]

    def kept(floor: float) -> dict[str, float]:
        config = SalienceConfig(idf_floor=floor)
        return {w.word.key: w.weight for w in salient_words(Prompt(1, "the dog"), config, frequency, "f")}

    assert kept(0.33) == {"dog": pytest.approx(0.9162907)}
    assert kept(0.31) == {"the": pytest.approx(0.5108256), "dog": pytest.approx(0.9162907)}
    with pytest.raises(DataError, match=r"f: every word .* --salience\.idf_floor"):
        kept(0.6)


def test_one_prompt_or_identical_prompts_keep_equal_positive_weights() -> None:
    for texts in (["red cat"], ["red cat"] * 50):
        frequency = DocumentFrequency.fit(prompts(*texts))
        weights = [w.weight for w in salient_words(Prompt(1, "red cat"), SalienceConfig(), frequency, "f")]
        assert len(weights) == 2
        assert weights[0] == weights[1] > 0


def test_template_words_are_not_counted() -> None:
    frequency = DocumentFrequency.fit([Prompt(1, "user hello", template=((0, 5),))])
    assert dict(frequency.counts) == {"hello": 1}


def test_idf_table_survives_json() -> None:
    frequency = DocumentFrequency.fit(prompts("a b", "b c"))
    again = DocumentFrequency.from_json(json.loads(json.dumps(frequency.to_json())))
    assert again == frequency
    assert again.idf("b") == frequency.idf("b")
    with pytest.raises(DataError, match="IDF table"):
        DocumentFrequency.from_json({"counts": {}})


# ---- weights ----


def test_spans_pick_the_words_they_touch() -> None:
    prompt = Prompt(1, "the small dog sat", spans=((6, 12),))  # "all do"
    found = salient_words(prompt, SalienceConfig(weighting="spans"), DocumentFrequency(1), "f")
    assert [(w.word.key, w.weight) for w in found] == [("small", 1.0), ("dog", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "config", "message"),
    [
        (Prompt(1, "<|a|>", template=((0, 5),)), SalienceConfig(), "only template markers"),
        (Prompt(1, "?! []"), SalienceConfig(), "holds no word"),
        (Prompt(1, "dog"), SalienceConfig(weighting="spans"), r"no passage .* is marked.*--data\.spans_column"),
        (Prompt(1, "dog ..", spans=((4, 6),)), SalienceConfig(weighting="spans"), "marked passages .* hold no word"),
    ],
)
def test_prompts_without_a_salient_word(prompt: Prompt, config: SalienceConfig, message: str) -> None:
    with pytest.raises(DataError, match=f"f, row 9: .*{message}"):
        salient_words(prompt, config, DocumentFrequency(1), "f, row 9")


# ---- tokens ----


def test_a_split_word_counts_once_and_punctuation_never() -> None:
    tok = byte_bpe()
    encoded = encode("zebra, dog!", tok)
    assert len([w for w in encoded.words if w == 0]) > 1  # zebra is in pieces
    assert {k: v.strip() for k, v in pieces(encoded, tok).items()} == {0: "zebra", 1: "dog"}
    assert encoded.salience == (1.0, 1.0)
    assert encoded.words[-1] == -1  # the exclamation mark


def test_both_occurrences_of_a_word_share_one_index() -> None:
    encoded = encode("the cat sat on The cat", word_level())
    # "The" is unknown to the tokenizer (<unk>, a special token), so it has no token of its own.
    assert encoded.words == (0, 1, 2, 3, -1, 1)
    assert encoded.salience == (1.0, 1.0, 1.0, 1.0)


def test_the_sink_is_skipped_and_bos_is_never_a_word() -> None:
    skipping = SalienceConfig(weighting="uniform")
    assert encode("the cat sat", word_level(), skipping).words == (-1, 0, 1)
    assert encode("the cat sat", word_level(bos=True), skipping).words == (-1, 0, 1, 2)
    assert encode("the cat sat", word_level(bos=True), UNIFORM).words == (-1, 0, 1, 2)
    with pytest.raises(DataError, match=r"f, row 1: .*first token.*--salience\.no_skip_sink"):
        encode("cat", word_level(), skipping)


def test_special_tokens_written_in_the_text_are_no_words() -> None:
    tok = byte_bpe()
    encoded = encode("<|im_end|> dog", tok)
    assert encoded.words[0] == -1
    assert {v.strip() for v in pieces(encoded, tok).values()} == {"dog"}
    with pytest.raises(DataError, match="no token of the prompt belongs to a word"):
        encode("<|im_end|><|im_start|>", tok)


def test_bytes_of_one_character_belong_to_its_word() -> None:
    tok = byte_bpe()
    encoded = encode("café dog", tok)
    spaces = [tok.decode([i]) for i, w in zip(encoded.ids, encoded.words, strict=True) if w == -1]
    assert all(not s.strip() for s in spaces)
    assert explain_salience(encoded, tok) == [("café", 1.0), ("dog", 1.0)]


def test_chat_text_gets_no_second_bos() -> None:
    plain, chat = Prompt(1, "the cat"), Prompt(1, "the cat", messages=({"role": "user", "content": "the cat"},))
    encoder = TextEncoder(word_level(bos=True))
    assert len(encode_prompt(plain, encoder).ids) == 3
    assert len(encode_prompt(chat, encoder).ids) == 2


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow can't say where"):
        TextEncoder(Slow())


def test_a_token_of_several_words_belongs_to_the_first_salient_and_the_others_merge() -> None:
    tok = tiny_stories()
    text = "Once upon a time there was a little girl who didn't cry."
    # Its tokens: <s> | ▁ | On | ce | upon a tim | e | there was a | little girl | who | didn't | cry | .
    encoded = encode(text, tok)
    assert explain_salience(encoded, tok) == [
        ("Once", 1.0),
        ("upon a tim", 2.0),  # upon, and the first of two a: that word merges here
        ("e", 1.0),  # time: its piece in the token before belongs to upon
        ("there was a", 2.0),  # there and was
        ("little girl", 2.0),
        ("who", 1.0),
        ("didn't", 1.0),
        ("cry", 1.0),
    ]
    assert encoded.words[1] == -1  # the lone ▁

    marked = Prompt(1, text, spans=((36, 40),))  # girl
    only = encode(marked, tok, SalienceConfig(weighting="spans"))
    assert explain_salience(only, tok) == [("little girl", 1.0)]


def test_offsets_survive_characters_the_tokenizer_drops() -> None:
    tok = tiny_stories()  # it has no token for “ or é and drops them, and its own offsets then slip
    text = "He said “yes” at the\tcafé with a big dog."
    tokens = encode_prompt(Prompt(1, text), TextEncoder(tok))
    surfaces = [s.replace("▁", " ").strip() for s in tok.convert_ids_to_tokens(list(tokens.ids))]
    assert len(surfaces) > 8
    for surface, (start, end), special in zip(surfaces, tokens.offsets, tokens.special, strict=True):
        if not special and surface:
            assert text[start:end].translate({ord(c): None for c in "“”\té"}).strip() == surface
    assert any("dog" in word for word, _ in explain_salience(encode(text, tok), tok))


def test_weights_add_up_where_words_share_a_token() -> None:
    tok = tiny_stories()
    frequency = DocumentFrequency(100, {"little": 10, "girl": 20})
    config = SalienceConfig()
    encoded = encode("She saw the little girl there", tok, config, frequency)
    weights = dict(explain_salience(encoded, tok))
    assert weights["little girl"] == pytest.approx(math.log(101 / 10) + math.log(101 / 20))


# ---- truncation ----


def test_truncation_keeps_the_end_and_the_special_tokens() -> None:
    tok = word_level(bos=True)
    prompt = Prompt(1, "the cat sat on the mat", spans=((0, 7), (19, 22)))
    tokens = encode_prompt(prompt, TextEncoder(tok))
    shorter, cut = truncate_prompt(prompt, tokens, 4, "f, row 1")
    assert tok.convert_ids_to_tokens(list(cut.ids)) == ["<s>", "on", "the", "mat"]
    assert shorter.text.split() == ["on", "the", "mat"]
    assert shorter.spans is not None
    assert [shorter.text[a:b].strip() for a, b in shorter.spans if shorter.text[a:b].strip()] == ["mat"]
    assert [shorter.text[a:b] for a, b in cut.offsets] == ["", "on", "the", "mat"]
    assert truncate_prompt(prompt, tokens, 7, "f") == (prompt, tokens)


def test_truncation_keeps_the_chat_template() -> None:
    prompt = Prompt(
        1, "[user] the cat sat [end]", template=((0, 7), (18, 24)), messages=({"role": "user", "content": "-"},)
    )
    tok = word_level()
    tokens = encode_prompt(prompt, TextEncoder(tok))  # [ unk ] the cat sat [ unk ]
    shorter, cut = truncate_prompt(prompt, tokens, 7, "f, row 1")
    assert [shorter.text[a:b] for a, b in cut.offsets] == ["[", "user", "]", "sat", "[", "end", "]"]
    assert "".join(shorter.text[a:b] for a, b in shorter.template) == "[user]  [end]"
    with pytest.raises(DataError, match=r"f, row 1: .*template alone leave no room.*--data\.max_prompt_length"):
        truncate_prompt(prompt, tokens, 6, "f, row 1")


def test_idf_power_flattens_the_weights_but_keeps_the_words() -> None:
    prompts = [Prompt(1, "rare common"), Prompt(2, "common other"), Prompt(3, "common more"), Prompt(4, "plain")]
    prompts += prompts[:2]  # once more: they count once
    frequency = DocumentFrequency.fit(prompts)
    plain = salient_words(prompts[0], SalienceConfig(), frequency, "here")
    flat = salient_words(prompts[0], SalienceConfig(idf_power=0.0), frequency, "here")
    root = salient_words(prompts[0], SalienceConfig(idf_power=0.5), frequency, "here")
    assert [word.word for word in flat] == [word.word for word in plain]
    assert [word.weight for word in flat] == [1.0, 1.0]
    assert [word.weight for word in plain] == pytest.approx([math.log(5 / 1), math.log(5 / 3)])
    assert [word.weight for word in root] == pytest.approx([math.log(5) ** 0.5, math.log(5 / 3) ** 0.5])
