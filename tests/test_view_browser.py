"""The viewer's page in a real browser: Playwright driving Debian's Chromium, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from cagsr.config import CoverageConfig, FocusConfig, GroundedCoverageConfig, ModelConfig, RewardConfig, SalienceConfig
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.models.decoder_only import DecoderOnly
from cagsr.models.load import LoadedModel, load_model
from cagsr.view import View, view
from cagsr.view.measure import REWARD

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

ODD = ["<script>", "</script>", '"', "'", "&amp;", "🐱", "</textarea>", "<!--", "{{", "$"]
UNIFORM = SalienceConfig(weighting="uniform")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(tiny.save_model(tmp_path_factory.mktemp("model"))), device="cpu"))


@pytest.fixture(scope="module")
def small(loaded: LoadedModel) -> View:
    answers = ["the red cat likes the red cat .", "a small dog", "the big house near the tree"]
    prompt = "tell me about the red cat near a big house ."
    reward = RewardConfig(
        coverage=CoverageConfig(weight=1.0),
        grounded_coverage=GroundedCoverageConfig(weight=0.0),
        focus=FocusConfig(weight=0.5),
    )
    return view(loaded, prompt, answers, reward=reward, salience=UNIFORM)


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open a view from its file; at the end no console message and no request may have been seen."""
    complaints: list[str] = []
    pages = []

    def open_page(what: View | str, width: int = 1280, height: int = 800, scheme: str = "light") -> Any:
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(what if isinstance(what, str) else what.html, encoding="utf-8")
        page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(path.as_uri())
        if not isinstance(what, str):
            page.wait_for_selector("body[data-ready]", timeout=10_000)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert complaints == []


def levels(page: Any, box: str) -> list[int]:
    script = "box => [...document.querySelectorAll(box + ' .t')].map(t => Number((t.className.match(/\\bl(\\d+)/) || [0, 0])[1]))"
    return page.evaluate(script, box)


def answer_box(place: int) -> str:
    return f".answer[data-answer='{place}'] .tokens"


def test_the_numbers_in_the_dom_are_the_terms(show: Any, small: View) -> None:
    page = show(small)
    cards = page.locator(".answer").all()
    assert len(cards) == 3
    for card, answer in zip(cards, small.measured.answers, strict=True):
        assert float(card.get_attribute("data-reward")) == answer.reward
        rows = card.locator("[data-term]").all()
        assert {row.get_attribute("data-term") for row in rows} == set(answer.terms)
        for row in rows:
            name = row.get_attribute("data-term")
            assert float(row.get_attribute("data-raw")) == answer.terms[name]
            if name in answer.contributions:
                assert float(row.get_attribute("data-contribution")) == answer.contributions[name]
        bars = [row for row in rows if row.get_attribute("data-contribution")]
        for row in bars:
            fill = row.locator(".fill")
            assert ("negative" in fill.get_attribute("class")) == (float(row.get_attribute("data-contribution")) < 0)


def test_colours_are_coverage_and_on_demand_salience(show: Any, small: View) -> None:
    page = show(small)
    measured = small.measured
    best, words = measured.answers[0].best, measured.prompt.words
    expected = [0 if w < 0 else min(10, round(10 * float(best[w]) / measured.reward.coverage.threshold)) for w in words]
    assert levels(page, "#prompt") == expected
    page.get_by_label("salience").check()
    assert levels(page, "#prompt") == [0 if w < 0 else 10 for w in words]  # uniform: all count alike
    page.get_by_label("coverage").check()
    page.locator(".answer[data-answer='2'] .show").click()
    best = measured.answers[2].best
    assert levels(page, "#prompt") == [0 if w < 0 else min(10, round(10 * float(best[w]) / 0.3)) for w in words]


def test_pointing_at_an_answers_token_shows_what_it_looked_at(show: Any, small: View) -> None:
    page = show(small)
    page.locator(answer_box(0)).locator(".t").nth(2).hover()
    looked = small.measured.answers[0].planes[REWARD][2]
    back = (np.rint(255 * np.sqrt(looked)) / 255) ** 2
    # The first token is the sink: it does not set the scale.
    expected = np.minimum(10, np.floor(10 * back / back[1:].max() + 0.5)).astype(int).tolist()
    assert levels(page, "#prompt") == expected
    # Three are underlined, and the number 1 stands at the strongest.
    strongest = page.locator("#prompt .t").nth(1 + int(back[1:].argmax()))
    assert page.locator("#prompt .top").count() == 3
    assert "top" in strongest.get_attribute("class").split()
    badge, token = page.locator("#prompt .badge[data-n='1']").bounding_box(), strongest.bounding_box()
    assert abs(badge["x"] + badge["width"] - token["x"] - token["width"]) < 8
    assert 0 < token["y"] - badge["y"] < 16
    assert f"{back[1:].max():.2f}"[:4] in page.locator("#status").inner_text()
    page.mouse.move(2, 2)
    assert page.locator("#prompt .top").count() == 0


def test_pointing_at_the_prompt_shows_which_tokens_looked_at_it(show: Any, small: View) -> None:
    page = show(small)
    page.locator("#prompt .t").nth(5).hover()
    columns = [(np.rint(255 * np.sqrt(one.planes[REWARD][:, 5])) / 255) ** 2 for one in small.measured.answers]
    most = max(column.max() for column in columns)
    for place, column in enumerate(columns):
        assert levels(page, answer_box(place)) == np.floor(10 * column / most + 0.5).astype(int).tolist()


def test_layers_and_heads_can_be_chosen(show: Any, small: View) -> None:
    from cagsr.view.measure import Plane

    page = show(small)
    assert page.locator("#head").is_disabled()
    page.locator("#layer").select_option("1")
    page.locator("#head").select_option("2")
    page.locator(answer_box(1)).locator(".t").nth(1).hover()
    looked = small.measured.answers[1].planes[Plane(1, 2)][1]
    back = (np.rint(255 * np.sqrt(looked)) / 255) ** 2
    assert levels(page, "#prompt") == np.minimum(10, np.floor(10 * back / back[1:].max() + 0.5)).astype(int).tolist()
    # Coverage and focus follow the choice.
    page.mouse.move(2, 2)
    changed = page.locator(".focus path").first.get_attribute("d")
    page.locator("#layer").select_option("")
    assert page.locator("#head").is_disabled()
    assert page.locator(".focus path").first.get_attribute("d") != changed


def test_chosen_layers_recompute_focus_and_coverage_rightly(loaded: LoadedModel, show: Any) -> None:
    """Layer 0 picked on the page gives what a reward that reads layer 0 alone gives."""
    from cagsr.config import AttentionConfig

    prompt, answer = "tell me about the red cat near a big house .", "the red cat likes a small house"
    page = show(view(loaded, prompt, answer, salience=UNIFORM))
    alone = view(loaded, prompt, answer, attention=AttentionConfig(layers="0"), salience=UNIFORM)
    page.locator("#layer").select_option("0")
    mean = float(page.locator(".focus-value").inner_text().split()[1].rstrip(","))
    assert mean == pytest.approx(alone.measured.answers[0].terms["focus"], abs=0.01)
    own = show(alone)
    assert np.abs(np.subtract(levels(page, "#prompt"), levels(own, "#prompt"))).max() <= 1


def test_keys_move_pin_and_let_go(show: Any, small: View) -> None:
    page = show(small)
    focused = "[...document.activeElement.parentElement.children].indexOf(document.activeElement)"
    page.locator("#prompt .t").first.focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", len(small.measured.tokens) - 1),
                       ("ArrowRight", len(small.measured.tokens) - 1), ("Home", 0), ("ArrowLeft", 0)):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(focused) == place
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").endswith("token 1 of 12")
    # One tab stop for each text; all of them can be reached.
    stops = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        stops.add(page.evaluate("document.activeElement.closest('.tokens')?.getAttribute('aria-label')"))
    assert {f"Tokens of answer {number}" for number in (1, 2, 3)} <= stops
    page.locator(answer_box(0)).locator(".t").first.focus()
    page.keyboard.press("ArrowRight")
    shaded = levels(page, "#prompt")
    page.keyboard.press("Enter")
    page.locator("#layer").focus()
    assert levels(page, "#prompt") == shaded  # pinned
    assert page.locator(".pinned").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".pinned").count() == 0
    assert levels(page, "#prompt") != shaded
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.locator("#prompt .t").first.focus()
    assert page.evaluate(outline) != "none"


def test_arrows_up_and_down_go_from_line_to_line(show: Any, small: View) -> None:
    page = show(small, width=400)
    page.locator("#prompt .t").first.focus()
    top = "document.activeElement.getBoundingClientRect().top"
    start = page.evaluate(top)
    page.keyboard.press("ArrowDown")
    assert page.evaluate(top) > start + 10
    page.keyboard.press("ArrowUp")
    assert page.evaluate(top) == pytest.approx(start, abs=3)


def test_repeated_ngrams_are_underlined(show: Any, small: View) -> None:
    page = show(small)
    for place, answer in enumerate(small.measured.answers):
        flags = page.evaluate(
            "box => [...document.querySelectorAll(box + ' .t')].map(t => getComputedStyle(t).textDecorationStyle === 'wavy')",
            answer_box(place),
        )
        assert flags == list(answer.repeated)
    assert any(any(answer.repeated) for answer in small.measured.answers)


def test_odd_texts_are_shown_literally(tmp_path: Path, show: Any) -> None:
    folder = tiny.save_model(tmp_path / "model")
    model = load_model(ModelConfig(str(folder), device="cpu"), for_training=False)
    model.tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ODD])
    model.model.resize_token_embeddings(len(model.tokenizer))
    text = "the cat " + " ".join(ODD)
    page = show(view(model, text + " dog", text, salience=UNIFORM))
    for box in ("#prompt", answer_box(0)):
        shown = page.locator(box).text_content()
        for sign in ODD:
            assert sign in shown, sign
        assert page.locator(box).evaluate("box => [...box.children].every(t => t.children.length === 0)")
    assert page.locator("script").count() == 2


def test_the_notebooks_frame_works(show: Any, small: View) -> None:
    page = show(f"<!doctype html><title>notebook</title><body>{small._repr_html_()}")
    frame = page.frame_locator("iframe")
    frame.locator("body[data-ready]").wait_for(timeout=10_000)
    frame.locator(".answer .t").nth(1).hover()
    assert frame.locator("#prompt .top").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_window(show: Any, small: View, width: int, scheme: str) -> None:
    page = show(small, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(14, 16, 20)") == (scheme == "dark")


@pytest.fixture(scope="module")
def large() -> View:
    """A prompt of 2,000 tokens and an answer of 500."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=28, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2600, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(8.0)
    loaded = LoadedModel(
        model, tiny.tokenizer(), "large", torch.device("cpu"), torch.float32, DecoderOnly(), (2,), False, ()
    )
    ids = (1, *torch.randint(4, 28, (1999,)).tolist())
    words = (-1, *(place % 700 for place in range(1999)))
    prompt = EncodedPrompt(Prompt(1, loaded.tokenizer.decode(ids)), ids, words, (1.0,) * 700)
    answer = " ".join(tiny.WORDS[place] for place in torch.randint(0, 24, (499,)).tolist())
    return view(loaded, prompt, answer)


def test_a_large_page_is_small_and_quick(show: Any, large: View) -> None:
    measured = large.measured
    assert (len(measured.tokens), len(measured.answers[0].tokens)) == (2000, 500)
    assert len(large.html.encode()) < 3_000_000
    assert "left out, because the page would grow" in large.html
    page = show(large)
    # From the event to the finished layout; the worst of many tokens, all of which change most of the prompt.
    script = """([box, count]) => {
      const spans = document.querySelectorAll(box + " .t"), times = [];
      for (let k = 0; k < count; k++) {
        const span = spans[Math.floor((k * spans.length) / count)], start = performance.now();
        span.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, clientX: k, clientY: 1 }));
        document.body.offsetHeight;
        times.push(performance.now() - start);
      }
      return times;
    }"""
    painted = """(place) => new Promise((done) => {
      const span = document.querySelectorAll(".answer .t")[place], start = performance.now();
      span.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, clientX: place + 1000, clientY: 2 }));
      requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
    })"""
    for box in (answer_box(0), "#prompt"):
        times = page.evaluate(script, [box, 40])
        print(f"{box}: median {np.median(times):.1f} ms, most {max(times):.1f} ms")
        assert np.median(times) < 100, times
    frames = [page.evaluate(painted, place) for place in range(0, 200, 20)]
    keys = page.evaluate(
        """() => {
      const times = [];
      document.querySelector(".answer .t").focus();
      for (let k = 0; k < 20; k++) {
        const start = performance.now();
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
        document.body.offsetHeight;
        times.push(performance.now() - start);
      }
      return times;
    }"""
    )
    print(f"painted: median {np.median(frames):.1f} ms; keys: median {np.median(keys):.1f} ms, most {max(keys):.1f} ms")
    print(f"page: {len(large.html.encode()) / 1e6:.2f} MB")
    # Up to the picture on the screen others' load on the machine counts too (there is no GPU): the quicker samples tell.
    assert np.percentile(frames, 25) < 100
    assert np.median(keys) < 100
    assert page.locator("#head").is_disabled()
