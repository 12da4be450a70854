"""Images through ``cagsr serve``: content parts with data URLs, kept with consent, judged, and trained on in idle time."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import seeing
from cagsr.config import ModelConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.models.load import LoadedModel, load_model
from cagsr.serving import work
from cagsr.serving.app import Server
from cagsr.serving.asking import Reader
from cagsr.serving.engine import Engine
from cagsr.serving.job import FOLDER, Job, JobFolder
from cagsr.serving.judges import Judges
from cagsr.serving.policies import Policies
from cagsr.serving.prompt_store import PromptStore
from cagsr.serving.settings import ConsentConfig, LearningConfig, LimitsConfig, ServeConfig, ServedLora, ServedModel
from cagsr.serving.versions import Versions


def image_url(image: Image.Image, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    image.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def chat(*urls: str, text: str = "tell me about the cat") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class Asking:
    """A server without a socket."""

    def __init__(self, folder: Path, loaded: LoadedModel, config: ServeConfig) -> None:
        self.config, self.store, versions = config, PromptStore(folder / "p.sqlite", config.consent), Versions(folder)
        judges = Judges(config, versions, None)
        self.engine = Engine(Policies(loaded, versions), judges, config.limits)
        server = Server(config, self.engine, self.store, versions, Reader(loaded, config, judges.of), dict)
        self.application = server.application("t" * 40, 1)

    def send(self, messages: Any, **fields: Any) -> tuple[int, Any]:
        body = json.dumps({"model": "seer", "messages": messages, "max_tokens": 3, **fields}).encode()
        headers = {"host": "127.0.0.1:1", "authorization": f"Bearer {'t' * 40}", "content-type": "application/json"}
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
                 "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}  # fmt: skip
        asked, sent = [{"type": "http.request", "body": body}], list[dict[str, Any]]()

        async def receive() -> dict[str, Any]:
            return asked.pop() if asked else await asyncio.Event().wait()  # type: ignore[func-returns-value]

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.application(scope, receive, send))  # type: ignore[arg-type]
        return sent[0]["status"], json.loads(b"".join(one.get("body", b"") for one in sent[1:]))


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    folder = tmp_path_factory.mktemp("seer")
    model = seeing.save_model(folder / "seer", "llava")
    terms = RewardConfig()
    reward = replace(
        terms,
        image_coverage=replace(terms.image_coverage, weight=1.0),
        grounded_coverage=replace(terms.grounded_coverage, weight=0.0),
        repetition=replace(terms.repetition, weight=0.0),
    )
    config = ServeConfig(
        model=ServedModel(str(model), device="cpu"),
        limits=LimitsConfig(images=2, image_pixels=10_000, body_bytes=100_000),
        learning=LearningConfig(steps=1, batch_size=2, kl=1e6),
        lora=ServedLora(r=2, target_modules="q_proj,v_proj"),
        sampling=SamplingConfig(num_generations=2, max_new_tokens=3),
        salience=SalienceConfig(weighting="uniform", image_grid=2),
        reward=reward,
    )
    found = Asking(folder, load_model(config.model, for_training=False), config)
    yield found
    found.engine.close()
    found.store.close()


def test_an_image_changes_the_answer_and_its_reward_is_told(asking: Asking) -> None:
    red, blue = image_url(seeing.picture("red")), image_url(seeing.picture("blue"), "JPEG")
    chances = []
    for urls in ((red,), (blue,), (red, blue), ()):
        status, found = asking.send(chat(*urls), temperature=0, logprobs=True, cagsr={"reward": True})
        assert status == 200, found
        terms = found["cagsr"]["reward"][0]["terms"]
        assert (terms["image_coverage"] is not None) == bool(urls)
        chances.append(found["choices"][0]["logprobs"]["content"][0]["logprob"])
        assert found["usage"]["prompt_tokens"] >= 16 * len(urls)
    assert len({round(one, 4) for one in chances}) == 4
    status, best = asking.send(chat(red), n=1, seed=1, cagsr={"best_of": 4, "reward": True})
    every = asking.send(chat(red), n=4, seed=1, cagsr={"reward": True})[1]["cagsr"]["reward"]
    assert best["cagsr"]["reward"][0]["total"] == pytest.approx(max(one["total"] for one in every))


@pytest.mark.parametrize(
    ("urls", "told"),
    [
        (["/etc/passwd"], "nothing is downloaded, and no file is read"),
        (["file:///etc/passwd"], "nothing is downloaded, and no file is read"),
        (["http://169.254.169.254/latest"], "nothing is downloaded, and no file is read"),
        (["data:text/html;base64,PGI+"], "must be the image itself"),
        (["data:image/png;base64,sesame"], "holds no base64"),
        (["data:image/png;base64,c2VzYW1l"], "is no image in PNG"),
        (["data:image/svg+xml;base64,PHN2Zy8+"], "is no image in PNG"),
        ([image_url(Image.new("1", (200, 51)))], "10,200 pixels are more than the 10,000 that are read"),
        ([image_url(seeing.picture("red"))] * 3, "3 images are more than the 2 that are read"),
    ],
    ids=lambda value: None,
)
def test_what_is_no_image_is_refused_without_a_trace(asking: Asking, urls: list[str], told: str) -> None:
    before = asking.store.counts()
    status, found = asking.send(chat(*urls), cagsr={"consent": True})
    assert status == 400
    assert told in found["error"]["message"]
    assert not any(word in found["error"]["message"] for word in ("passwd", "sesame", "169.254"))
    assert asking.store.counts() == before


def test_a_placeholder_in_a_text_is_no_image(asking: Asking) -> None:
    for messages in (chat(text="what is <image> here"), [{"role": "user", "content": "what is <image> here"}]):
        status, found = asking.send(messages)
        assert status == 400
        assert "the placeholder <image> and no image" in found["error"]["message"]


def test_a_model_of_texts_says_that_it_reads_no_images(asking: Asking, tmp_path: Path) -> None:
    from serve_client import save_chat_model

    loaded = load_model(ModelConfig(str(save_chat_model(tmp_path / "model")), device="cpu"), for_training=False)
    blind = Asking(tmp_path, loaded, ServeConfig(model=ServedModel("seer")))
    status, found = blind.send(chat(image_url(seeing.picture("red"))))
    blind.engine.close()
    blind.store.close()
    assert (status, found["error"]["message"]) == (400, "This model reads no images; leave them out.")


def test_kept_images_are_trained_on_and_compared_with(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work.signal, "signal", lambda *_: None)
    store = PromptStore(tmp_path / "p.sqlite", ConsentConfig(), hold_out=False)
    for colour in ("red", "blue", "green", "black"):
        store.keep(chat(image_url(seeing.picture(colour)), text="the big house"))
    store.keep([{"role": "user", "content": "the small bird"}])
    kept, place = store.prompts(), JobFolder(tmp_path / FOLDER)
    store.close()
    job = Job(1, 0, 5, 0)
    place.begin(job, asking.config, kept[1:], [{"prompt": one.prompt} for one in kept[:2]])
    work.work(tmp_path)
    verdict = place.verdict()
    assert verdict is not None
    assert (verdict["steps"], verdict["prompts"], verdict["compared_on"]) == (1, 4, 2)
    metrics = json.loads((place.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["rewards/image_coverage/mean"] > 0
