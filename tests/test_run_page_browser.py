"""The run's page in a real browser: Playwright driving Debian's Chromium, from a file and served while a run is killed."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import apart
import tiny
from cagsr.run_page.read_run import read_run
from cagsr.run_page.run_html import render_page
from page_server import serve_runs
from run_pages import HOSTILE, WARNING, make_run, metrics, sample, write

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

LONG = 120_000
"""Milliseconds: others' work may hold all cores."""


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open runs from a file, or an address; at the end no console message and no foreign request may have been seen."""
    complaints: list[str] = []
    expected: list[str] = []
    pages: list[Any] = []

    def open_page(*what: Path | str, width: int = 1280, height: int = 800, scheme: str = "light") -> Any:
        if isinstance(what[0], str):
            address = what[0]
        else:
            path = tmp_path / f"page{len(pages)}.html"
            path.write_text(render_page([read_run(Path(run), Path(run).name) for run in what]), encoding="utf-8")
            address = path.as_uri()
        page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        pages.append(page)
        page.set_default_timeout(LONG)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on(
            "request", lambda request: request.url.startswith((address[:20], "data:")) or complaints.append(request.url)
        )
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        return page

    open_page.expected = expected  # type: ignore[attr-defined]
    yield open_page
    for page in pages:
        page.context.close()
    assert [one for one in complaints if not any(text in one for text in expected)] == []


def chart(page: Any, key: str) -> Any:
    return page.locator(f'.chart[data-key="{key}"]')


def drawn(page: Any, name: str) -> list[dict[str, list[float]]]:
    """The columns of a data source in every chart, in the order of the charts."""
    script = """(name) => Bokeh.documents.map((one) => {
      const data = one.get_model_by_name(name).data;
      return Object.fromEntries(Object.entries(data).map(([key, values]) => [key, [...values]]));
    })"""
    return page.evaluate(script, name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", warnings=[WARNING])


def test_the_numbers_on_the_page_are_those_of_the_file(show: Any, run: Path) -> None:
    page = show(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = page.locator("#charts .chart").evaluate_all("charts => charts.map(one => one.dataset.key)")
    sources = drawn(page, "line0")
    assert {"eval/metric", "objective/raw_scores", "rewards/coverage/mean", "objective/kl", "response/length",
            "policy/clipfrac_avg", "val/explained_variance"} <= set(keys)  # fmt: skip
    compared = 0
    by_key = dict(zip(keys[: len(sources)], sources, strict=True))
    for key, source in by_key.items():
        if key in ("step_seconds", "tokens_per_second"):
            continue
        expected = [(row["step"], row[key]) for row in rows if key in row]
        assert list(zip(source["step"], source["value"], strict=True)) == expected, key
        compared += len(expected)
        # What stands below the curve is the last point.
        read = chart(page, key).locator(".read [data-value]")
        assert (int(read.get_attribute("data-step")), float(read.get_attribute("data-value"))) == expected[-1]
    assert compared > 150
    for row in page.locator("#glance tr[data-metric]").all():
        expected = [one[row.get_attribute("data-metric")] for one in rows if row.get_attribute("data-metric") in one]
        assert float(row.get_attribute("data-first")) == expected[0]
        assert float(row.get_attribute("data-last")) == expected[-1]
    assert float(page.locator(".cost").get_attribute("data-total")) == 70.0
    # Curves under "More curves" are drawn when they are asked for.
    page.locator('[data-id="more"] summary').click()
    page.wait_for_function("() => Bokeh.documents.length === document.querySelectorAll('.chart').length")


def test_pointing_and_keys_show_a_steps_values_in_all_curves(show: Any, run: Path) -> None:
    page = show(run)
    kl, length = chart(page, "objective/kl"), chart(page, "response/length")
    plot = kl.locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] * 0.6, "y": 60})
    page.wait_for_selector("#tip:not([hidden])")
    step = int(kl.locator("[data-value]").get_attribute("data-step"))
    assert 8 <= step <= 14
    assert float(kl.locator("[data-value]").get_attribute("data-value")) == metrics(step)["objective/kl"]
    assert float(length.locator("[data-value]").get_attribute("data-value")) == metrics(step)["response/length"]
    assert page.locator("#tip").inner_text().startswith(f"step {step}")
    hair = length.locator(".hair").bounding_box()
    page.mouse.move(2, 2)
    page.wait_for_selector("#tip", state="hidden")
    assert length.locator("[data-value]").get_attribute("data-step") == "20"
    kl.focus()
    for key, expected in (("ArrowLeft", 19), ("Shift+ArrowLeft", 9), ("Home", 0), ("ArrowRight", 1), ("End", 20)):
        page.keyboard.press(key)
        page.wait_for_function(f"() => document.getElementById('cursor').value === '{expected}'")
    assert length.locator(".hair").bounding_box()["x"] > hair["x"]
    page.locator("#cursor").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "() => document.querySelector('.chart[data-key=\"objective/kl\"] [data-step]').dataset.step === '19'"
    )
    assert page.locator("#cursor").get_attribute("aria-valuetext") == "step 19 of 20"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_warnings_are_said_and_marked(show: Any, run: Path) -> None:
    page = show(run)
    item = page.locator("#warnings li")
    assert item.count() == 1
    assert "Length drifts" in item.inner_text()
    assert "<b>40</b> tokens" in item.inner_text()
    assert "warned at step 9" in chart(page, "response/length").inner_text()
    marks = [one["step"] for one in drawn(page, "marks0")]
    assert sorted(marks)[-1] == [9]
    assert sum(map(len, marks)) == 1
    item.get_by_role("button").click()
    page.wait_for_function("() => document.getElementById('cursor').value === '9'")


def test_answers_their_breakdown_and_what_changed(show: Any, run: Path) -> None:
    page = show(run)
    cards = page.locator(".answer")
    assert [cards.nth(k).get_attribute("data-step") for k in range(cards.count())] == ["20", "20"]
    card = cards.first
    expected = sample(20, "tell me about the cat", "", 0.25 * 20 - 1)
    assert float(card.get_attribute("data-reward")) == expected["reward"]
    term = card.locator("tr[data-term='coverage']")
    assert float(term.get_attribute("data-raw")) == expected["terms"]["coverage"]
    assert float(term.get_attribute("data-contribution")) == expected["contributions"]["coverage"]
    assert [text.strip() for text in card.locator("ins").all_inner_texts()] == ["red", "20"]
    assert card.locator("del").inner_text().strip() == "1"
    assert "since step 1 (reward −0.75)" in card.inner_text()
    page.get_by_label("mark changes").uncheck()
    assert page.locator(".answer ins").count() == 0
    page.get_by_label("earlier step").click()
    assert cards.first.get_attribute("data-step") == "19"
    page.get_by_label("one prompt over time").check()
    assert cards.count() == 20
    assert cards.first.get_attribute("data-step") == "1"
    # The choices are there again when the page is loaded again.
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.get_by_label("one prompt over time").is_checked()
    assert not page.get_by_label("mark changes").is_checked()


def test_several_runs_are_told_apart_and_can_be_hidden(show: Any, run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", steps=30, done=12, final=False)
    page = show(run, other)
    assert page.locator("#state li").all_inner_texts()[1].startswith("stopped")
    kl = chart(page, "objective/kl")
    assert kl.locator("[data-run='0']").first.get_attribute("data-step") == "20"
    place = page.locator("#charts .chart").evaluate_all(
        "all => all.findIndex(one => one.dataset.key === 'objective/kl')"
    )
    assert drawn(page, "line1")[place]["step"] == list(range(1, 13))
    looks = page.evaluate(
        """(place) => [0, 1].map((run) => {
          const find = (name) => Bokeh.documents[place].roots()[0].renderers.find((one) => one.name === name + run);
          const line = find("raw").glyph, dot = find("dot").glyph;
          return [line.line_dash.value ?? line.line_dash, dot.marker.value ?? dot.marker];
        })""",
        place,
    )
    assert looks[0][0] != looks[1][0]
    assert looks[0][1] != looks[1][1]
    seen = (
        "([place, run]) => Bokeh.documents[place].roots()[0].renderers.find((one) => one.name === 'raw' + run).visible"
    )
    page.locator(".legend input").nth(1).uncheck()
    assert page.evaluate(seen, [place, 0])
    assert not page.evaluate(seen, [place, 1])
    page.locator("#cursor").focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => document.getElementById('cursor').value === '0'")
    playwright.expect(kl.locator(".read [data-run]")).to_have_count(0)  # hidden, and no value at step 0
    assert "run.steps" in page.locator("#settings").inner_text()


def test_hostile_texts_are_shown_literally(show: Any, tmp_path: Path) -> None:
    warning = {"step": 2, "name": "x", "sentence": HOSTILE, "action": "warn"}
    samples = [sample(1, HOSTILE, HOSTILE, 0.1) | {"terms": {HOSTILE: 1.0}, "contributions": {HOSTILE: 1.0}}]
    run = make_run(
        tmp_path / "run", warnings=[warning], samples=samples, rows=[{"step": 1, HOSTILE: 1.0, "objective/kl": 0.1}]
    )
    page = show(run)
    shown = HOSTILE.replace("\u2028", "")
    assert shown in page.locator(".answer .text").text_content().replace("\u2028", "")
    assert shown in page.locator("#warnings").text_content().replace("\u2028", "")
    assert page.locator("script").count() == 3
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_window(show: Any, run: Path, tmp_path: Path, width: int, scheme: str) -> None:
    other = make_run(tmp_path / "a-second-run-with-quite-a-long-name-of-its-own", done=12, final=False)
    page = show(*((run, other) if scheme == "light" else (run,)), width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 16, 20)") == (scheme == "dark")
    colour = "Bokeh.documents[0].roots()[0].renderers.find((one) => one.name === 'raw0').glyph.line_color"
    light = page.evaluate(f"JSON.stringify({colour}.value ?? {colour})")
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    page.wait_for_function(f"(old) => JSON.stringify({colour}.value ?? {colour}) !== old", arg=light)


# ---- Served ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[Any]:
    """Serve folders from a process of its own; give the address."""
    with ExitStack() as servers:
        yield lambda *folders: servers.enter_context(apart.served(serve_runs, *folders))


def get(address: str, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_only_requests_to_this_machine_are_answered(served: Any, run: Path) -> None:
    address = served(run)
    status, text = get(address, "/news.json")
    version = json.loads(text)["version"]
    assert status == 200
    assert "data" not in json.loads(get(address, f"/news.json?have={version}")[1])
    assert get(address, "/", Host="evil.example")[0] == 400
    assert get(address, "/news.json", Host="evil.example:80")[0] == 400
    assert get(address, "/../config.yaml")[0] == 404
    assert "connect-src" not in get(address, "/page.html")[1].split("<style>")[0]
    assert "connect-src 'self'" in get(address, "/")[1].split("<style>")[0]


def test_news_come_without_losing_place_or_choices(show: Any, served: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=6, final=False)
    page = show(served(run))
    page.get_by_label("smooth").uncheck()
    page.locator("#from").fill("2")
    page.locator("#from").blur()
    page.locator("#settings summary").click()
    page.get_by_label("earlier step").click()
    page.evaluate("window.scrollTo(0, 900)")
    at = page.evaluate("scrollY")
    write(run / "metrics.jsonl", [metrics(step) for step in range(1, 10)])
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 10, "objec')  # half a line
    write(run / "warnings.jsonl", [WARNING])
    page.wait_for_function("() => document.querySelector('#cursor').max === '9'")
    page.wait_for_function("() => document.querySelectorAll('#warnings li').length === 1")
    assert abs(page.evaluate("scrollY") - at) < 200  # the warning's own height may push it
    assert not page.get_by_label("smooth").is_checked()
    assert page.locator("#from").input_value() == "2"
    assert page.locator("#settings details").get_attribute("open") is not None
    assert page.locator("#answers-step").input_value() == "5"
    (run / "warnings.jsonl").write_text("{oh\n{}\n")
    page.wait_for_function("() => document.getElementById('contact').textContent.includes('warnings.jsonl, line 1')")
    write(run / "warnings.jsonl", [])
    page.wait_for_function("() => document.getElementById('warnings').textContent.includes('None of the monitors')")
    assert "lost" not in (page.locator("#contact").get_attribute("class") or "")


def test_a_killed_training_is_said(show: Any, tmp_path: Path) -> None:
    """The real thing: a page that waits, a training that begins, SIGKILL, and a training that goes on to its end."""
    start, prompts, run = tiny.save_model(tmp_path / "start"), tiny.save_prompts(tmp_path / "p.jsonl"), tmp_path / "run"
    training = ["train", "--model", start, "--data", prompts, "--output_dir", run,
                "--run.batch_size", "2", "--sampling.num_generations", "2", "--sampling.max_new_tokens", "4",
                "--evaluation.held_out", "2", "--evaluation.every", "0", "--model.device", "cpu",
                "--run.save_every", "1"]  # fmt: skip
    with apart.cagsr("report", run, "--serve") as page_server, apart.cagsr(*training, "--steps", "100000") as trained:
        page = show(page_server.wait_for(r"http://127\.0\.0\.1:\d+/").group())
        badge = page.locator("#state .badge")
        page.wait_for_selector("#state li[data-state='running']")
        page.wait_for_function("() => Number(document.getElementById('cursor').max) >= 3")
        assert "Training goes on" in page.locator("#state").inner_text()
        trained.kill()
        trained.wait()
        page.wait_for_selector("#state li[data-state='stopped']")
        last = len((run / "metrics.jsonl").read_bytes().split(b"\n")) - 2  # step 0, and what follows the last newline
        assert "killed" in page.locator("#state").inner_text()
        page.wait_for_function(
            f"() => document.getElementById('state').textContent.includes('at step {last} of 100000')"
        )
        assert badge.inner_text() == "stopped"
        assert page.title().startswith("stopped")
        page.wait_for_function(f"() => document.getElementById('cursor').max === '{last}'")
        apart.finish(apart.cagsr(*training, "--steps", last + 1, "--resume"))
        page.wait_for_selector("#state li[data-state='finished']")
        show.expected.append("ERR_CONNECTION_REFUSED")
        page_server.kill(signal.SIGINT)
        assert page_server.wait(60) in (0, 130)
        # Now the page says that nobody answers; the browser's own complaint about that is the one expected.
        page.wait_for_function("() => document.getElementById('contact').textContent.includes('not answering')")
