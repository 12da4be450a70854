"""The rating page in a real browser, its server a process of its own that is killed in the middle."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import apart
from cagsr.rating.rating_questions import RatingQuestion
from cagsr.rating.store import SCALES, Settings, Store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

PATIENCE = 90_000
"""Milliseconds: the machine may be busy with other things."""
ODD = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b&gt;\u202e\x00🐱"


class Served:
    """``cagsr rate serve`` as a process that can be killed and started again at the same address."""

    def __init__(self, folder: Path, questions: int, *, scales: bool = False, odd: bool = False) -> None:
        self.folder = folder
        self.port = apart.free_port()
        asked = []
        for number in range(questions):
            text = f"prompt {number} {ODD * odd}"
            prompt: Any = [{"role": "user", "content": text}] if number % 2 else text
            asked.append(RatingQuestion(prompt, f"a{number} {ODD * odd}", f"b{number} {ODD * odd}"))
        settings = Settings("a.jsonl", "b.jsonl", SCALES if scales else (), 0)
        Store.create(folder / "r.sqlite", asked, settings).close()
        self.start()

    def start(self) -> None:
        self.process = apart.cagsr("rate", "serve", "--db", self.folder / "r.sqlite", "--port", self.port)
        self.url = self.process.wait_for(r"Open (http://\S+)\s")[1]

    def kill(self) -> None:
        self.process.end()

    def rows(self, what: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.folder / "r.sqlite") as database:
            return database.execute(what).fetchall()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(questions: int, **more: bool) -> Served:
        made.append(Served(tmp_path, questions, **more))
        return made[-1]

    yield start
    for one in made:
        one.kill()


@pytest.fixture
def show(browser: Any) -> Iterator[Any]:
    """Open the page and give a name; at the end nothing may have been asked of other addresses."""
    foreign: list[str] = []
    contexts = []

    def open_page(
        served: Served, name: str | None = "Ada", width: int = 1280, complaints: list[str] | None = None
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        own = f"http://127.0.0.1:{served.port}/"
        page.on("request", lambda request: request.url.startswith((own, "data:")) or foreign.append(request.url))
        if complaints is not None:
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(served.url)
        page.wait_for_selector("body[data-ready]")
        if name is not None:
            page.fill("#name", name)
            page.keyboard.press("Enter")
            page.wait_for_selector("#ask:not([hidden])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []


def asked(page: Any) -> tuple[str, str, str]:
    """The question's name and both texts, once the page is not waiting for its server."""
    page.wait_for_selector("body[data-busy=false]", timeout=PATIENCE)
    found = page.evaluate("[document.body.dataset.question, left.textContent, right.textContent]")
    return found[0], found[1], found[2]


def press(page: Any, key: str) -> None:
    page.keyboard.press(key)


def counts(page: Any, text: str) -> None:
    """Wait until the page says how many are rated."""
    playwright.expect(page.locator("#count")).to_have_text(text, timeout=PATIENCE)


def test_200_judgements_with_the_server_killed_twice(serve: Any, show: Any) -> None:
    """None lost, none doubled, and each what the rater chose. The kills come while the keys go on."""
    served = serve(200)
    page = show(served)
    random_choice = random.Random(0)
    expected: dict[str, str] = {}
    restarted: list[float] = []

    def kill_and_start(after: float) -> None:
        time.sleep(after)
        served.kill()
        time.sleep(0.5)
        served.start()
        restarted.append(time.monotonic())

    threads: list[threading.Thread] = []
    for number in range(200):
        if number in (60, 130):
            thread = threading.Thread(target=kill_and_start, args=(random_choice.uniform(0, 0.05),), daemon=True)
            thread.start()
            threads.append(thread)
        question, left, right = asked(page)
        assert question not in expected
        # The rule says a side, not a place: a slip between the two would show.
        kind = random_choice.choice(["a", "b", "tie", "both_bad", "skip"])
        key = {"tie": "t", "both_bad": "b", "skip": "s"}.get(kind)
        if key is None:
            key = "ArrowLeft" if left.startswith(kind) else "ArrowRight"
        assert {left[0], right[0]} == {"a", "b"}
        expected[question] = kind
        press(page, key)
    page.wait_for_selector("#end:not([hidden])")
    for thread in threads:
        thread.join()
    assert len(restarted) == 2
    found = served.rows("SELECT question, choice FROM ratings")
    assert len(found) == 200
    assert dict(found) == expected
    assert served.rows("SELECT count(*) FROM undone") == [(0,)]
    assert len({left for (left,) in served.rows("SELECT a_left FROM orders")}) == 2
    assert page.inner_text("#count") == "200 of 200"
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('unsent')).length") == 0


def test_a_choice_made_while_the_server_is_away_survives_the_page(serve: Any, show: Any) -> None:
    served = serve(3)
    page = show(served)
    question, left, _ = asked(page)
    served.kill()
    press(page, "ArrowLeft")
    page.wait_for_selector("#notice:not([hidden])")
    assert "kept here" in page.inner_text("#notice")
    assert page.get_attribute("[data-choice=left]", "aria-pressed") == "true"
    press(page, "t")  # nothing more is taken until the first one is safe
    page.close()  # even the page goes
    served.start()
    again = page.context.new_page()
    again.goto(served.url)
    again.wait_for_selector("body[data-ready]")
    assert again.inner_text("#count") == "1 of 3"
    assert asked(again)[0] != question
    assert served.rows("SELECT question, choice FROM ratings") == [(question, left[0])]


def test_undo_resume_and_several_raters(serve: Any, show: Any) -> None:
    complaints: list[str] = []
    served = serve(3, scales=True)
    page = show(served, complaints=complaints)
    assert page.evaluate("location.href").endswith(f":{served.port}/")  # the token is gone from the address
    first = asked(page)
    press(page, "ArrowRight")
    assert "6 to go" in page.inner_text("#status")
    for key in "54321":
        press(page, key)
    page.click("fieldset[data-side=right][data-scale=helpfulness] label:has-text('3')")
    press(page, "ArrowRight")  # the key moves the mark from 3 to 4: it belongs to the row
    assert page.locator("[name=right-helpfulness]:checked").get_attribute("value") == "4"
    assert asked(page) == first
    press(page, "r")
    counts(page, "1 of 3")
    second = asked(page)
    assert second[0] != first[0]
    press(page, "u")
    counts(page, "0 of 3")
    assert asked(page) == first
    assert page.locator(".marks input:checked").count() == 6  # the marks are still there
    press(page, "l")
    counts(page, "1 of 3")
    ((choice, scales),) = served.rows("SELECT choice, scales FROM ratings")
    assert choice == first[1][0]
    marks = {
        "left": {"relevance": 5, "fluency": 4, "helpfulness": 3},
        "right": {"relevance": 2, "fluency": 1, "helpfulness": 4},
    }
    assert json.loads(scales) == {first[1][0]: marks["left"], first[2][0]: marks["right"]}
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert asked(page) == second
    page.click("#leave")
    page.fill("#name", "Bob")
    page.click("text=Start")
    counts(page, "0 of 3")
    press(page, "s")
    counts(page, "1 of 3")
    assert served.rows("SELECT name, choice FROM ratings JOIN raters ON raters.id = rater ORDER BY ratings.id") == [
        ("Ada", choice),
        ("Bob", "skip"),
    ]
    assert complaints == []


def test_markup_in_prompts_and_answers_stays_text(serve: Any, show: Any) -> None:
    complaints: list[str] = []
    served = serve(2, odd=True)
    page = show(served, name=f"<i>{'x' * 20}</i>", complaints=complaints)
    for _ in range(2):
        _, left, right = asked(page)
        for text in (left, right, page.text_content("#prompt")):
            assert "<script>document.title='owned'</script>&lt;b&gt;" in text
        assert page.locator("#rating img, #rating script, #rating i, #rating b").count() == 0
        press(page, "t")
    page.wait_for_selector("#end:not([hidden])")
    assert page.title() == "Which answer is better?"
    assert page.inner_text("#who").startswith("<i>")
    assert complaints == []


def test_nothing_is_wider_than_the_window(serve: Any, show: Any) -> None:
    served = serve(2, scales=True)
    with sqlite3.connect(served.folder / "r.sqlite") as database:
        database.execute("UPDATE questions SET a = ?, b = ?", ("w" * 3000, "line\n" * 200))
    for width in (1280, 400):
        page = show(served, name="x" * 40, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("left", "right", "tie", "both_bad", "skip"):
            box = page.locator(f"[data-choice={name}]").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= 800  # the choices are in sight however long the answers are


def test_another_site_in_the_same_browser_can_do_nothing(serve: Any, show: Any, browser: Any) -> None:
    """A page of another origin posts with the reader's cookie at hand, and reads: neither gets through."""
    served = serve(2)
    page = show(served)
    other = page.context.new_page()
    other.route("http://evil.test/", lambda route: route.fulfill(body="<h1>hello</h1>", content_type="text/html"))
    other.goto("http://evil.test/")
    database = page.evaluate("document.body.dataset.database")
    message = json.dumps({"database": database, "rater": "Mallory"})
    attack = """async ([url, body]) => { const seen = [];
        for (const type of ['application/json', 'text/plain'])
            for (const mode of ['cors', 'no-cors'])
                try { const r = await fetch(url + 'api/rater', {method: 'POST', credentials: 'include', mode,
                    headers: {'Content-Type': type}, body}); seen.push(r.type); } catch (e) { seen.push('blocked'); }
        try { await (await fetch(url + 'api/state?rater=Ada', {credentials: 'include'})).text(); seen.push('read'); }
        catch (e) { seen.push('blocked'); }
        return seen; }"""
    seen = other.evaluate(attack, [f"http://127.0.0.1:{served.port}/", message])
    assert set(seen) <= {"blocked", "opaque"}
    assert seen[-1] == "blocked"
    assert served.rows("SELECT name FROM raters") == [("Ada",)]
