"""The viewer's page of a prompt with images, in a real browser: what each word looked at lies over the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import seeing
from cagsr.config import ModelConfig, SalienceConfig
from cagsr.models.load import load_model
from cagsr.view import view

SCRIPT = """() => [...document.querySelectorAll('.region')].map(one => [
    Number((one.className.match(/ l(\\d+)/) || [0, 0])[1]), getComputedStyle(one, '::before').opacity])"""


def test_regions_are_shaded_by_what_a_word_looked_at(browser: Any, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(str(seeing.save_model(tmp_path / "m", "llava")), device="cpu"), for_training=False)
    found = view(
        loaded,
        "tell me about the red cat",
        ["the red cat likes a dog", "a small bird"],
        salience=SalienceConfig(weighting="uniform", image_grid=2),
        images=[seeing.picture("red", (60, 60)), seeing.picture("blue", (40, 40))],
    )
    best = found.measured.answers[0].regions
    assert best is not None
    complaints: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    page.goto(found.save(tmp_path / "page.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("() => [...document.images].map(one => [one.naturalWidth, one.naturalHeight])") == [
        [60, 60],
        [40, 40],
    ]
    covered = np.rint(10 * np.clip(best.max(axis=0) / found.measured.reward.image_coverage.threshold, 0, 1))
    levels = page.evaluate(SCRIPT)
    assert np.abs(np.array([level for level, _ in levels]) - covered).max() <= 1  # 8 bits of attention
    assert [float(opacity) for _, opacity in levels] == pytest.approx([0.075 * level for level, _ in levels])

    page.locator(".answer[data-answer='0'] .tokens .t").nth(1).hover()
    looked = best[1] / best[1].max()
    assert np.abs(np.array([level for level, _ in page.evaluate(SCRIPT)]) - 10 * looked).max() <= 1
    spot = int(best[1].argmax())
    named = f"Of the images most at region {spot % 4 + 1} of image {spot // 4 + 1}"
    assert named in page.locator("#status").inner_text()

    page.locator(".region").nth(6).hover()
    told = page.locator("#status").inner_text()
    assert told.startswith("region 3 of image 2: ")
    assert f"best attention {best[:, 6].max():.2f}" in told
    assert complaints == []
    page.close()
