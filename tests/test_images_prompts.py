"""Rows with images: what is read of them, which regions they have and what those weigh, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import seeing
import tiny
from cagsr.config import DataConfig, ModelConfig, SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import (
    Attention,
    EncodedPrompt,
    EpisodeBatch,
    ImageInputs,
    Picture,
    Prompt,
    PromptBatch,
    Readings,
    RewardBatch,
)
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts, prepare_prompts
from cagsr.reward.terms.image_balance import ImageBalance, ImageBalanceConfig
from cagsr.reward.terms.image_coverage import ImageCoverage, ImageCoverageConfig

UNIFORM = SalienceConfig(weighting="uniform", image_grid=2)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(seeing.save_model(tmp_path_factory.mktemp("llava"), "llava")), device="cpu"))


def read(
    loaded: LoadedModel, folder: Path, row: Mapping[str, Any], salience: SalienceConfig = UNIFORM
) -> EncodedPrompt:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(str(folder / "rows.jsonl"))
    (found,) = prepare_prompts(data, salience, loaded.tokenizer, max_length=200, vision=loaded.vision).prompts
    return found


def asked(image: Any, salience: SalienceConfig, loaded: LoadedModel, **columns: Any) -> EncodedPrompt:
    (found,) = encode_texts(["the cat"], loaded.tokenizer, salience, 200, images=[[image]], vision=loaded.vision)
    return found


def test_where_an_image_may_stand(llava: LoadedModel, tmp_path: Path) -> None:
    """A column or a part, a path, a data URL or a file's bytes; its placeholder where it is written, or in front."""
    seeing.picture("red").save(tmp_path / "a.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    plain = [
        read(llava, tmp_path, {"prompt": "the cat", "images": value})
        for value in (["a.png"], "a.png", [url], [str(tmp_path / "a.png")])
    ]
    assert {one.prompt.text for one in plain} == {"<image>near the cat"}  # as the chat template writes an image
    assert {one.regions for one in plain} == {plain[0].regions}
    assert plain[0].prompt.given == "the cat"
    written = read(llava, tmp_path, {"prompt": "the <image> cat", "images": ["a.png"]})
    assert written.prompt.text == "the <image> cat"
    assert written.prompt.given is None
    assert written.words[:2] == (-1, 0)  # the sink, "the"; then 16 pieces of the image, and "cat"
    assert written.words[2:] == (-1,) * 16 + (1,)
    bare = read(llava, tmp_path, {"prompt": "<image>", "images": ["a.png"]})
    assert (set(bare.words), bare.salience, len(bare.regions)) == ({-1}, (), 4)
    talk = [{"role": "user", "content": "the cat"}]
    parts = [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "the cat"}]}]
    in_chat = [read(llava, tmp_path, {"prompt": talk, "images": ["a.png"]}), read(llava, tmp_path, {"prompt": parts})]
    assert in_chat[0].ids == in_chat[1].ids
    assert in_chat[0].prompt.text == "<bos><user><image>near the cat<eos><assistant>"
    assert [in_chat[0].prompt.text[one.start : one.end] for one in in_chat[0].prompt.spoken] == ["the cat"]
    assert max(in_chat[0].words) == 1  # "near" is the template's


def test_a_placeholder_is_expanded_once(llava: LoadedModel, tmp_path: Path) -> None:
    """As many pieces as the processor gives the image (4 by 4), however often the prompt's tensors are made."""
    seeing.picture("red").save(tmp_path / "a.png")
    found = read(llava, tmp_path, {"prompt": "the cat", "images": ["a.png"]})
    assert llava.vision is not None
    assert found.ids.count(llava.vision.token_id) == 16 == sum(place >= 0 for place in found.places)
    for _ in range(2):
        inputs = llava.vision.inputs(found, torch.device("cpu"))
        assert inputs is not None
        assert inputs.tensors["pixel_values"].shape == (1, 3, 16, 16)
    seeing.picture("blue").save(tmp_path / "a.png")  # same size: its colour may change, its ids stay
    assert llava.vision.inputs(found, torch.device("cpu")) is not None


def test_regions_are_cells_and_weigh_their_contrast(llava: LoadedModel) -> None:
    """A red square on white that fills the upper left quarter: there every pixel is as far from white as red is, elsewhere none."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste("red", (0, 0, 16, 16))
    found = asked(image, UNIFORM, llava)
    assert [(one.left, one.top, one.right, one.bottom) for one in found.regions] == [
        (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)
    ]  # fmt: skip
    assert [one.weight for one in found.regions] == pytest.approx([(2 / 3) ** 0.5, 0, 0, 0])
    pieces = [place for place, number in zip(found.places, found.ids, strict=True) if number == llava.vision.token_id]  # type: ignore[union-attr]
    assert pieces == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    alike = asked(image, SalienceConfig(weighting="uniform", image_grid=2, image_weights="uniform"), llava)
    assert [one.weight for one in alike.regions] == [1.0] * 4
    blank = asked(Image.new("RGB", (32, 32), "white"), UNIFORM, llava)
    assert [one.weight for one in blank.regions] == [1.0] * 4


def test_what_a_processor_cuts_off_is_no_region(llava: LoadedModel) -> None:
    """Of an image three times as wide as high the middle third is seen: of 6 columns the third and the fourth."""
    found = asked(Image.new("RGB", (96, 32)), SalienceConfig(weighting="uniform", image_grid=6), llava)
    assert {one.left for one in found.regions} == {2 / 6, 3 / 6}


def test_boxes_are_regions(llava: LoadedModel, tmp_path: Path) -> None:
    """The smaller box lies on the larger one; a box between the pieces has the nearest; the rest is no region."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste("red", (0, 0, 8, 8))
    image.save(tmp_path / "a.png")
    boxes = [[0, 0, 16, 16], [0, 0, 8, 8], [31, 31, 32, 32]]
    found = read(llava, tmp_path, {"prompt": "the cat", "images": ["a.png"], "boxes": boxes})
    pieces = [place for place, number in zip(found.places, found.ids, strict=True) if number == llava.vision.token_id]  # type: ignore[union-attr]
    assert pieces == [1, 0, -1, -1, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2]
    quarter, red, corner = (one.weight for one in found.regions)
    assert (red, corner) == pytest.approx(((2 / 3) ** 0.5, 0))
    assert quarter == pytest.approx((2 / 3 / 4) ** 0.5)


def bad(tmp_path: Path) -> list[tuple[dict[str, Any], str]]:
    seeing.picture("red").save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    cat = {"prompt": "the cat"}
    hole = [{"type": "image"}, {"type": "text", "text": "the cat"}]
    part = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]
    return [
        ({**cat, "images": ["none.png"]}, r"row 1, image 1 \(none\.png\): there is no such image file"),
        ({**cat, "images": ["text.png"]}, r"text\.png\): is no image in PNG"),
        ({**cat, "images": ["broken.png"]}, r"broken\.png\): the image can't be read"),
        ({**cat, "images": ["https://x.org/a.png"]}, r"is not on this machine; download it"),
        ({**cat, "images": [7]}, r"an image is a file's path or a PIL image, and this is a int"),
        ({"prompt": "<image> the <image>", "images": ["a.png"]}, r"2 placeholders <image> and 1 image;"),
        ({"prompt": "<image> the cat"}, r"the placeholder <image> and no image"),
        (
            {**cat, "images": ["a.png"], "boxes": [[0, 0, 99, 4]]},
            r"box \[0, 0, 99, 4\] does not lie in image 1 of 24 x 24",
        ),
        ({**cat, "images": ["a.png"], "boxes": "x"}, r"column 'boxes' must hold a list of boxes"),
        ({**cat, "images": ["a.png"], "boxes": [[], []]}, r"holds boxes for 2 images, and the prompt has 1"),
        ({"prompt": part, "images": ["a.png"]}, r"give each image once"),
        ({"prompt": [{"role": "user", "content": hole}]}, r"the placeholder <image> and no image"),
    ]


def test_what_is_refused(llava: LoadedModel, tmp_path: Path) -> None:
    for row, sentence in bad(tmp_path):
        with pytest.raises(DataError, match=sentence):
            read(llava, tmp_path, row)


def test_an_image_that_would_fill_the_memory(
    llava: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing.picture("red", (40, 40)).save(tmp_path / "a.png")
    for limit in (1000, 500):  # Pillow warns of the one and refuses the other
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=f"has more than {limit:,} pixels"):
            read(llava, tmp_path, {"prompt": "the cat", "images": ["a.png"]})


def test_a_model_of_texts_and_one_without_its_processor(tmp_path: Path) -> None:
    seeing.picture("red").save(tmp_path / "a.png")
    text = load_model(ModelConfig(str(tiny.save_model(tmp_path / "text")), device="cpu"))
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: the prompt has images, which nothing reads here"):
        read(text, tmp_path, {"prompt": "the cat", "images": ["a.png"]})
    folder = seeing.save_model(tmp_path / "llava", "llava")
    (folder / "processor_config.json").unlink()
    alone = load_model(ModelConfig(str(folder), device="cpu"))
    assert alone.vision is None
    assert any(note.startswith("Images: not read") for note in alone.notes)
    assert read(alone, tmp_path, {"prompt": "the cat"}).ids


def test_prompts_of_a_cross_attention_model_have_as_many_images(tmp_path: Path) -> None:
    folder = seeing.save_model(tmp_path / "mllama", "mllama")
    loaded = load_model(ModelConfig(str(folder), device="cpu"))
    seeing.picture("red").save(tmp_path / "a.png")
    rows = [{"prompt": "the cat", "images": ["a.png"] * count} for count in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"the prompts have 1 or 2 images"):
        prepare_prompts(data, UNIFORM, loaded.tokenizer, max_length=200, vision=loaded.vision)


def test_an_answer_holds_no_image(llava: LoadedModel) -> None:
    from cagsr.scoring.answers import answered, encode_response

    prompt = asked(seeing.picture("red"), UNIFORM, llava)
    with pytest.raises(DataError, match="the answer holds an image's token"):
        answered(llava, [prompt], [encode_response(llava, prompt, "the <image> cat")])


def looked(regions: torch.Tensor | None) -> RewardBatch:
    """Two answers of three tokens, the second one token shorter; one prompt with an image, and one without."""
    real = torch.tensor([[True, True, True], [True, True, False]])
    words = torch.tensor([[[0.3, 0.0], [0.0, 0.06], [0.0, 0.0]], [[0.0, 0.0]] * 3])
    image = ImageInputs({}, False, 9, torch.tensor([0, 1, -1]), torch.tensor([3.0, 1.0]))
    images = None if regions is None else (image, None)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    prompts = PromptBatch(
        (Prompt(1, "a", images=(Picture("a.png", "a"),)), Prompt(2, "b")),
        ids,
        real,
        ids - 1,
        torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
        torch.tensor([0, 1]),
        images,
    )
    episodes = EpisodeBatch.of_one_turn(prompts, ids, real, torch.ones(2, dtype=torch.bool), ("", ""))
    zeros = torch.zeros(2, 3)
    return RewardBatch(
        episodes, Readings(zeros, zeros, zeros, zeros), None, Attention(torch.zeros(2, 3, 3), words, regions)
    )


def test_the_terms_by_hand() -> None:
    """Regions weigh 3/4 and 1/4; tau 0.3: 0.15 covers the first by half, 0.6 the second wholly: 3/8 + 1/4 = 5/8."""
    regions = torch.tensor([[[0.15, 0.0], [0.1, 0.6], [0.0, 0.0]], [[0.9, 0.9]] * 3])
    batch = looked(regions)
    found = ImageCoverage(ImageCoverageConfig())(batch)
    assert found.applies.tolist() == [True, False]
    assert found.values[0] == pytest.approx(5 / 8)
    gains = ImageCoverage(ImageCoverageConfig(dense=True))(batch)
    assert gains.values[0].tolist() == pytest.approx([3 / 8, 1 / 4, 0])
    # Of the words one is covered and one by a fifth: 3/5, which is less.
    balance = ImageBalance(ImageBalanceConfig())(batch)
    assert balance.applies.tolist() == [True, False]
    assert balance.values[0] == pytest.approx(3 / 5)
    blind = ImageBalance(ImageBalanceConfig())(looked(torch.zeros(2, 3, 2)))
    assert blind.values[0] == 0
    for term in (ImageCoverage(ImageCoverageConfig()), ImageBalance(ImageBalanceConfig())):
        assert not term(looked(None)).applies.any()
