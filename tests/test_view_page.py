"""The viewer's numbers and its page, without a browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
import zlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tiny
from cagsr.config import (
    AttentionConfig,
    CoverageConfig,
    FocusConfig,
    LengthConfig,
    ModelConfig,
    RepetitionConfig,
    RewardConfig,
    SalienceConfig,
    SamplingConfig,
)
from cagsr.errors import ConfigError, DataError
from cagsr.html_page import script_json
from cagsr.models.load import LoadedModel, load_model
from cagsr.reward.answers import AnswerScorer
from cagsr.view import View, view
from cagsr.view.measure import REWARD, Answer, Plane, token_pieces
from cagsr.view.view_html import ROOM, pack, pack_all, page_data, quantise

PROMPT = "tell me about the red cat near a big house ."
ANSWERS = ["the red cat likes the red cat .", "a small dog", "the big house near the tree"]
UNIFORM = SalienceConfig(weighting="uniform")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(tiny.save_model(tmp_path_factory.mktemp("model"))), device="cpu"))


@pytest.fixture(scope="module")
def seen(loaded: LoadedModel) -> View:
    reward = RewardConfig(focus=FocusConfig(weight=0.5), repetition=RepetitionConfig(n=2))
    return view(loaded, PROMPT, ANSWERS, reward=reward, salience=UNIFORM)


def test_what_is_shown_token_by_token_adds_up_to_the_terms(seen: View) -> None:
    for answer in seen.measured.answers:
        assert answer.gains.sum() == pytest.approx(answer.terms["coverage"], abs=1e-6)
        assert answer.focus.mean() == pytest.approx(answer.terms["focus"], abs=1e-6)
        covered = np.minimum(1.0, answer.best / seen.measured.reward.coverage.threshold)
        assert (covered * seen.measured.share).sum() == pytest.approx(answer.terms["coverage"], abs=1e-6)
        assert sum(answer.contributions.values()) == pytest.approx(answer.reward, abs=1e-9)


def test_the_best_comes_first_and_keeps_its_number(seen: View) -> None:
    rewards = [answer.reward for answer in seen.measured.answers]
    assert rewards == sorted(rewards, reverse=True)
    assert [ANSWERS[answer.number - 1] for answer in seen.measured.answers] == [
        answer.text for answer in seen.measured.answers
    ]
    assert sum(rewards) == pytest.approx(0, abs=1e-6)  # normalised among the answers


def test_repeated_tokens_by_hand(seen: View) -> None:
    first = next(answer for answer in seen.measured.answers if answer.number == 1)
    # the red cat likes [the red cat] . <eos>: "the red" and "red cat" are said again.
    assert first.repeated == (False, False, False, False, True, True, True, False, False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_heads_make_layers_and_layers_make_what_the_reward_reads(kind: str, tmp_path: Path) -> None:
    model = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"), for_training=False)
    found = view(model, PROMPT, ANSWERS[:2], salience=UNIFORM).measured
    assert len(found.planes) == 1 + 2 + 8
    for answer in found.answers:
        planes = answer.planes
        assert planes[REWARD].shape == (len(answer.tokens), len(found.tokens))
        for layer in (0, 1):
            heads = np.mean([planes[Plane(layer, head)] for head in range(4)], axis=0)
            np.testing.assert_allclose(heads, planes[Plane(layer, None)], atol=1e-6)
        layers = (planes[Plane(0, None)] + planes[Plane(1, None)]) / 2
        np.testing.assert_allclose(layers, planes[REWARD], atol=1e-6)


def test_the_reward_reads_the_layers_it_is_told_to(loaded: LoadedModel) -> None:
    found = view(loaded, PROMPT, "a cat", attention=AttentionConfig(layers="0", heads="1"), salience=UNIFORM).measured
    assert found.layers == (0,)
    np.testing.assert_allclose(found.answers[0].planes[REWARD], found.answers[0].planes[Plane(0, 1)], atol=1e-6)


def test_one_answer_is_weighed_raw(loaded: LoadedModel) -> None:
    found = view(loaded, PROMPT, "the red cat", salience=UNIFORM).measured
    (answer,) = found.answers
    assert "one answer alone has no scale" in found.scale
    assert answer.contributions["grounded_coverage"] == pytest.approx(answer.terms["grounded_coverage"], abs=1e-9)
    assert answer.contributions["repetition"] == pytest.approx(-0.3 * answer.terms["repetition"], abs=1e-9)


def test_sampling_is_repeatable_and_leaves_the_generator(loaded: LoadedModel) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    same = [
        view(loaded, PROMPT, 3, seed=1, sampling=SamplingConfig(max_new_tokens=6), salience=UNIFORM) for _ in range(2)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert same[0].html == same[1].html
    assert len(same[0].measured.answers) == 3


def test_bad_answers_are_refused(loaded: LoadedModel) -> None:
    for none in (0, []):
        with pytest.raises(ConfigError, match="no answers"):
            view(loaded, PROMPT, none, salience=UNIFORM)
    with pytest.raises(DataError, match="Answer 2 has zero tokens"):
        view(loaded, PROMPT, ["a cat", ""], salience=UNIFORM)
    with pytest.raises(DataError, match="context of 64"):
        view(loaded, PROMPT, "the cat " * 40, salience=UNIFORM)


# ---- The page -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_quantised_attention_is_close(values: list[float]) -> None:
    attention = np.array(values, dtype=np.float32)
    back = (quantise(attention) / 255.0) ** 2
    assert (np.abs(back - attention) <= np.sqrt(attention) / 255 + 1 / 510**2 + 1e-7).all()
    assert np.abs(back - attention).max() <= 0.004


def test_packed_attention_comes_back_in_order(seen: View) -> None:
    measured = seen.measured
    answer = measured.answers[0]
    content = zlib.decompress(base64.b64decode(pack(answer, measured.planes)))
    shape = (len(measured.planes), len(answer.tokens), len(measured.tokens))
    back = np.frombuffer(content, np.uint8).reshape(shape)
    for number, plane in enumerate(measured.planes):
        assert (back[number] == quantise(answer.planes[plane])).all()


def _noisy(seen: View, count: int, response: int, prompt: int, planes: tuple[Plane, ...]) -> View:
    """The worst case for the page's size: attention that can't be compressed."""
    noise = np.random.default_rng(0).random((response, prompt), dtype=np.float32) ** 2
    answer = dataclasses.replace(seen.measured.answers[0], planes=dict.fromkeys(planes, noise))
    answers: tuple[Answer, ...] = (answer,) * count
    return View(dataclasses.replace(seen.measured, answers=answers, planes=planes))


def test_heads_then_layers_then_the_last_answers_are_left_out(seen: View) -> None:
    layer, head = Plane(0, None), Plane(0, 0)
    big = _noisy(seen, 1, 300, 2000, (REWARD, layer, head))
    planes, packed = pack_all(big.measured)
    assert planes == (REWARD, layer)
    assert sum(len(one or "") for one in packed) <= ROOM
    planes, packed = pack_all(_noisy(seen, 1, 500, 2000, (REWARD, layer, head)).measured)
    assert planes == (REWARD,)
    planes, packed = pack_all(_noisy(seen, 3, 400, 2000, (REWARD, layer)).measured)
    assert [one is None for one in packed] == [False, False, True]
    assert "left out" in _noisy(seen, 3, 400, 2000, (REWARD, layer)).html


@given(st.text())
def test_no_text_gets_out_of_its_script_element(text: str) -> None:
    written = script_json({"x": text})
    assert not re.search("[<>&\u2028\u2029]", written)
    assert json.loads(written) == {"x": text}


def test_the_page_is_self_contained_and_allows_no_connection(seen: View) -> None:
    page = seen.html
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "default-src 'none'" in page
    script = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_the_notebook_shows_the_same_page_in_a_closed_frame(seen: View) -> None:
    shown = seen._repr_html_()
    assert html.unescape(re.search('srcdoc="([^"]*)"', shown)[1]) == seen.html  # type: ignore[index]
    assert 'sandbox="allow-scripts"' in shown
    assert "<script" not in shown


def test_a_term_that_does_not_apply_is_said_so(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    values = AnswerScorer.values
    monkeypatch.setattr(
        AnswerScorer, "values", lambda self, batch: values(self, batch) | {"length": torch.full((1,), torch.nan)}
    )
    page = view(loaded, PROMPT, "a cat", reward=RewardConfig(length=LengthConfig(weight=1)), salience=UNIFORM).html
    assert "does not apply" in page
    assert 'data-term="length" data-raw=""' in page


def test_the_picture_has_a_heat_map_and_survives_odd_signs(loaded: LoadedModel, tmp_path: Path) -> None:
    found = view(loaded, PROMPT, [*ANSWERS, "the $cat$", "^_ {\\"], salience=UNIFORM)
    path = found.save_png(tmp_path / "page.png")
    picture = Image.open(path).convert("RGB")
    assert picture.width > 600
    colours = {picture.getpixel((x, y)) for x in range(0, picture.width, 9) for y in range(0, picture.height, 9)}
    assert len(colours) > 20


def test_a_threshold_is_what_the_page_saturates_at(loaded: LoadedModel) -> None:
    reward = RewardConfig(coverage=CoverageConfig(threshold=0.125))
    data = page_data(view(loaded, PROMPT, "a cat", reward=reward, salience=UNIFORM).measured)
    assert data["threshold"] == 0.125


def test_all_shades_can_be_read() -> None:
    """WCAG contrast of text on every step of the ramp, in light and dark; lightness moves one way only."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    css = files("cagsr.view").joinpath("view.css").read_text(encoding="utf-8")
    for rising, part in zip((-1, 1), css.split("prefers-color-scheme: dark"), strict=True):
        ramp = []
        for step in range(11):
            pair = [re.search(rf"--{name}{step}:(#\w{{6}})", part)[1] for name in "st"]  # type: ignore[index]
            low, high = sorted(map(luminance, pair))
            assert (high + 0.05) / (low + 0.05) >= 4.5, step
            ramp.append(luminance(pair[0]) * rising)
        assert ramp == sorted(ramp)


def test_the_documents_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Path(__file__).parent.parent / "docs/view.md"
    (block,) = re.findall("```py\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
    tiny.save_model(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(document), "exec"), {})
    assert {"page.html", "page.png"} <= {path.name for path in tmp_path.iterdir()}


# ---- Tokens as text -----------------------------------------------------------------------------------------------


def test_pieces_keep_their_spaces() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("the red cat")["input_ids"]
    assert token_pieces(tokenizer, ids) == ["<bos>", " the", " red", " cat"]
    assert token_pieces(tokenizer, []) == []


def test_a_character_of_several_bytes_is_shown_once() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "a 🐱é</script>"
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(pieces) == text
    assert pieces[2:7] == ["🐱", "", "", "", "é"]
    # A character cut in two at the end of an answer stays visible as one that is no character.
    assert "".join(token_pieces(tokenizer, ids[:4])) == "a \ufffd\ufffd"
