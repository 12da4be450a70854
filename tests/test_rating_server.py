"""The page's server over real HTTP: who is let in, what is answered, and what nobody can do."""

from __future__ import annotations

import http.client
import json
import socket
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import apart
from cagsr.errors import ConfigError
from cagsr.rating.rating_questions import RatingQuestion
from cagsr.rating.server import LARGEST, link, rating_app
from cagsr.rating.store import SCALES, Settings, Store
from cagsr.support.localhost import listen
from page_server import serve_ratings

QUESTIONS = [RatingQuestion(f"prompt {number}", f"a {number}", f"b {number}") for number in range(3)]
READ, WRITE = ("GET", "/api/state?rater=Ada&database="), ("POST", "/api/rate")


@dataclass
class Live:
    """A served ratings file, and requests as any program could make them."""

    store: Store
    port: int

    def ask(self, method: str, path: str, body: Any = None, **headers: str | None) -> tuple[int, dict[str, str], str]:
        """Send a request with the page's own headers, changed by ``headers`` (None leaves one out)."""
        own = f"127.0.0.1:{self.port}"
        sent: dict[str, str | None] = {"Host": own, "Cookie": f"cagsr_rate_{self.port}={self.store.token}"}
        if method == "POST":
            sent |= {"Origin": f"http://{own}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        for last in (False, False, True):  # what is refused before its body is read may lose its answer to a reset
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(content)))
            try:
                connection.endheaders(content)
                response = connection.getresponse()
                text = response.read().decode()
            except ConnectionResetError:
                if last:
                    raise
                continue
            finally:
                connection.close()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, text
        raise AssertionError

    def post(self, path: str, **message: Any) -> tuple[int, dict[str, Any]]:
        """Send a message as the page does."""
        status, _, text = self.ask("POST", path, {"database": self.store.database, "rater": "Ada", **message})
        return status, json.loads(text)


@pytest.fixture(params=[()], ids=["plain"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Live]:
    store = Store.create(tmp_path / "r.sqlite", QUESTIONS, Settings("a", "b", request.param, 0))
    store.join("Ada")
    with apart.served(serve_ratings, tmp_path / "r.sqlite") as address:
        yield Live(store, int(address.rstrip("/").rpartition(":")[2]))
    store.close()


def rating(live: Live, **more: Any) -> dict[str, Any]:
    asked = live.store.progress("Ada").question  # type: ignore[union-attr]
    assert asked is not None
    return {"question": asked.id, "choice": "left", "client_id": "message-1", **more}


def test_the_link_opens_the_page_and_the_cookie_goes_on(live: Live) -> None:
    status, headers, page = live.ask("GET", f"/?token={live.store.token}", Cookie=None)
    assert status == 200
    cookie = headers["set-cookie"]
    assert f"cagsr_rate_{live.port}={live.store.token}" in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert live.store.token not in page
    assert "<script>" not in page
    assert "http://" not in page
    for path in ("/", "/rate.js", "/rate.css"):
        assert live.ask("GET", path)[0] == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"


def test_without_the_token_nothing_is_told_or_done(live: Live) -> None:
    message = {"database": live.store.database, "rater": "Ada", **rating(live)}
    for method, path in (READ, WRITE, ("GET", "/"), ("GET", "/rate.js"), ("GET", "/nowhere")):
        for token in (None, "", "wrong", live.store.token[:-1], "ü"):
            given: dict[str, str | None] = {"Cookie": None}
            if token is not None:
                given = {"Cookie": f"cagsr_rate_{live.port}={token}", "X_Cagsr_Token": token}
            status, headers, text = live.ask(method, path, message if method == "POST" else None, **given)
            assert status == 403, (method, path, token)
            assert "set-cookie" not in headers
            assert "prompt" not in text
    assert live.ask("GET", "/?token=wrong", Cookie=None)[0] == 403
    assert live.store.judgements() == []


def test_the_token_in_a_query_opens_the_page_alone(live: Live) -> None:
    """Else a link, or an image of another page that guessed nothing but knew it from a log, could read or write."""
    for path in (f"/api/state?rater=Ada&token={live.store.token}", f"/rate.js?token={live.store.token}"):
        assert live.ask("GET", path, Cookie=None)[0] == 403
    assert live.ask("POST", f"/api/rate?token={live.store.token}", rating(live), Cookie=None)[0] == 403
    assert live.ask("GET", "/rate.js", Cookie=None, X_Cagsr_Token=live.store.token)[0] == 200


def test_a_rebinding_host_is_refused_though_it_has_the_token(live: Live) -> None:
    message = {"database": live.store.database, "rater": "Ada", **rating(live)}
    own = f"127.0.0.1:{live.port}"
    foreign = (
        "evil.example",
        f"evil.example:{live.port}",
        "127.0.0.1",
        "127.0.0.1:1",
        f"127.0.0.1.evil.example:{live.port}",
        "",
    )
    for method, path in (READ, WRITE, ("GET", "/")):
        for host in (*foreign, None, f"{own}, evil.example"):
            status, _, text = live.ask(method, path, message, Host=host, Origin=f"http://{host}")
            assert status == 421 if host else status in (400, 421), (method, path, host)  # h11 wants one itself
            assert "prompt" not in text
    assert live.store.judgements() == []


def test_another_page_cannot_write(live: Live) -> None:
    message = {"database": live.store.database, "rater": "Mallory", **rating(live)}
    origins = (None, "null", "http://evil.example", "http://127.0.0.1:1", f"https://127.0.0.1:{live.port}", "")
    changes: list[dict[str, str | None]] = [{"Origin": origin} for origin in origins]
    changes += [{"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}]
    for path in ("/api/rate", "/api/undo", "/api/rater"):
        for changed in changes:
            assert live.ask("POST", path, message, **changed)[0] == 403, (path, changed)
    assert live.store.judgements() == []
    assert live.store.progress("Mallory") is None


def test_localhost_is_this_machine_too(live: Live) -> None:
    host = f"localhost:{live.port}"
    message = {"database": live.store.database, "rater": "Ada", **rating(live)}
    assert live.ask("POST", "/api/rate", message, Host=host, Origin=f"http://{host}")[0] == 200
    # Not a mixture of both: that is another origin.
    assert live.ask("POST", "/api/rate", message, Host=host)[0] == 403


def test_nothing_listens_on_other_addresses(live: Live) -> None:
    other = socket.socket()
    with pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", live.port))
    other.close()


def test_a_rater_from_name_to_end(live: Live) -> None:
    status, found = live.post("/api/rater", rater=" Eve ")
    assert status == 200
    assert (found["rater"], found["done"], found["total"], found["last"]) == ("Eve", 0, 3, None)
    assert set(found["question"]) == {"id", "prompt", "left", "right"}  # neither sides nor gold are told
    for number, choice in enumerate(("left", "tie", "skip")):
        message = {"question": found["question"]["id"], "choice": choice, "client_id": f"message-{number}"}
        status, found = live.post("/api/rate", rater="Eve", **message)
        assert (status, found["outcome"], found["done"]) == (200, "done", number + 1)
        assert live.post("/api/rate", rater="Eve", **message)[1] == {**found, "outcome": "before"}
    assert found["question"] is None
    status, found = live.post("/api/undo", rater="Eve", client_id="message-2")
    assert (status, found["done"], found["last"]) == (200, 2, "message-1")
    assert len(live.store.judgements()) == 2
    status, _, text = live.ask("GET", f"/api/state?rater=Eve&database={live.store.database}")
    assert status == 200
    assert json.loads(text)["question"] == found["question"]


def test_a_second_window_meets_a_conflict_and_goes_on(live: Live) -> None:
    message = rating(live)
    assert live.post("/api/rate", **message)[0] == 200
    status, found = live.post("/api/rate", **{**message, "client_id": "message-2", "choice": "right"})
    assert (status, found["outcome"], found["done"]) == (409, "conflict", 1)
    assert found["question"]["id"] != message["question"]


def test_messages_that_make_no_sense(live: Live) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({"choice": "best"}, 400),
        ({"choice": None}, 400),
        ({"question": 7}, 400),
        ({"client_id": ""}, 400),
        ({"client_id": "x" * 65}, 400),
        ({"more": 1}, 400),
        ({"marks": {"left": {"fluency": 3}, "right": {"fluency": 3}}}, 400),  # nobody asked for marks
        ({"rater": "Nobody"}, 404),
        ({"question": "0" * 32}, 404),
        ({"database": "other"}, 412),
    ]
    for changed, status in cases:
        found, answer = live.post("/api/rate", **{**rating(live), **changed})
        assert found == status, changed
        assert answer["error"].endswith(".")
    assert live.store.judgements() == []


def test_other_bodies_and_methods(live: Live) -> None:
    assert live.ask("POST", "/api/rate", b"{")[0] == 400
    assert live.ask("POST", "/api/rate", b"[" * 9000)[0] == 400
    assert live.ask("POST", "/api/rate", b"\xff\xfe")[0] == 400
    assert live.ask("POST", "/api/rate", b" " * (LARGEST + 1))[0] == 413
    assert live.ask("POST", "/api/rate", rating(live), Content_Type="text/plain")[0] == 415
    assert live.ask("GET", "/api/rate")[0] == 405
    assert live.ask("GET", "/api/state?rater=Nobody&database=" + live.store.database)[0] == 404
    assert live.ask("GET", "/nowhere")[0] == 404
    status, answer = live.post("/api/rater", rater=" \u200b")
    assert (status, answer["error"]) == (400, "A name of 1 to 40 characters is needed.")


@pytest.mark.parametrize("live", [SCALES], indirect=True, ids=["scales"])
def test_scales_are_asked_for_in_full_except_of_a_skip(live: Live) -> None:
    full = {side: dict.fromkeys(SCALES, 4) for side in ("left", "right")}
    bad = (
        None,
        {"left": full["left"]},
        {**full, "right": {"fluency": 3}},
        {**full, "left": {**full["left"], "fluency": 6}},
        {**full, "left": {**full["left"], "fluency": 0}},
        {**full, "left": {**full["left"], "fluency": True}},
        {**full, "left": {**full["left"], "fluency": 3.5}},
        {**full, "left": {**full["left"], "style": 3}},
    )
    for marks in bad:
        assert live.post("/api/rate", **rating(live, marks=marks))[0] == 400
    assert live.post("/api/rate", **rating(live, marks=full))[0] == 200
    assert live.post("/api/rate", **rating(live, choice="skip", client_id="message-2"))[0] == 200
    assert [one.marks is None for one in live.store.judgements()] == [False, True]


def test_a_refusing_disk_is_said_and_nothing_is_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    store = Store.create(tmp_path / "r.sqlite", QUESTIONS, Settings("a", "b", (), 0))
    asked = store.join("Ada").question
    assert asked is not None
    monkeypatch.setattr(store, "rate", full)
    message = {
        "database": store.database,
        "rater": "Ada",
        "question": asked.id,
        "choice": "left",
        "client_id": "message-1",
    }
    own = "http://127.0.0.1:8000"
    headers = {"Origin": own, "Cookie": f"cagsr_rate_8000={store.token}"}
    with TestClient(rating_app(store, 8000), base_url=own) as client:  # no server: the failure is in this process
        answer = client.post("/api/rate", json=message, headers=headers)
    assert answer.status_code == 503
    assert answer.json()["error"] == "The ratings file refuses: database or disk is full."
    store.close()


def test_a_taken_port_is_one_sentence(live: Live) -> None:
    with pytest.raises(ConfigError, match=f"--port {live.port}: is taken by another program"):
        listen(live.port)
    free = listen(0)
    assert link(live.store, free).startswith(f"http://127.0.0.1:{free.getsockname()[1]}/?token=")
    free.close()
