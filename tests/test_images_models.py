"""Models that see, each of its kind: what is captured is what eager attention is, and what is decoded is what is scored."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PaliGemmaProcessor

import seeing
from cagsr.config import AttentionConfig, ModelConfig, SalienceConfig, SamplingConfig
from cagsr.errors import DataError, ModelError
from cagsr.flow import EncodedPrompt, EpisodeBatch, Readings
from cagsr.models import sharing
from cagsr.models.image_arguments import ImageArguments, stacked
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.sharing import shares_prompts
from cagsr.prompts.prepare import encode_texts
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.scoring.answers import Response, answered
from cagsr.scoring.scorer import Scorer

TEXTS = ["tell me about the cat", "the big red house near the tree and a dog"]
WORDS = SalienceConfig(weighting="uniform", image_grid=2)
ANSWERS = [[9, 12, 2], [20, 6, 7, 10, 2], [5, 2], [22, 23, 24, 2]]


@pytest.fixture(scope="module", params=[*seeing.KINDS, *seeing.SIBLINGS])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = seeing.save_model(tmp_path_factory.mktemp("seeing") / request.param, request.param)
    return load_model(ModelConfig(str(folder), device="cpu"))


@pytest.fixture(scope="module")
def eager(loaded: LoadedModel) -> Any:
    return AutoModelForImageTextToText.from_pretrained(loaded.path, attn_implementation="eager").eval()


def kind_of(loaded: LoadedModel) -> str:
    return Path(loaded.path).name


def images_of(loaded: LoadedModel) -> list[list[Any]]:
    """One image and two, of other sizes; of mllama, whose prompts must have as many, two and two."""
    one, two = seeing.picture("red"), seeing.picture("blue", (32, 20))
    return [[one, two] if kind_of(loaded) == "mllama" else [one], [two, one]]


def encoded(loaded: LoadedModel) -> list[EncodedPrompt]:
    return encode_texts(TEXTS, loaded.tokenizer, WORDS, 200, images=images_of(loaded), vision=loaded.vision)


def two_answers_each(loaded: LoadedModel) -> EpisodeBatch:
    prompts = [one for one in encoded(loaded) for _ in range(2)]
    made = answered(loaded, prompts, [Response("", tuple(ids), True) for ids in ANSWERS])
    batch = prompt_batch(loaded, encoded(loaded), 2)
    return replace(made, prompts=batch)


class Kept:
    """A visitor that keeps what it is handed, row by row, prompts ending at the same column."""

    def __init__(self) -> None:
        self.maps: dict[int, Tensor] = {}
        self.regions: dict[int, Tensor] = {}

    def visit(
        self, index: Tensor, part: EpisodeBatch, readings: Readings, attention: Tensor, regions: Tensor | None = None
    ) -> None:
        assert regions is not None
        for place, row in enumerate(index.tolist()):
            length, real = int(part.real[place].sum()), part.prompts.real[place]
            self.maps[row], self.regions[row] = attention[place, :length][:, real], regions[place, :length]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
def test_captured_equals_eager(loaded: LoadedModel, eager: Any, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images, prompts padded on the left, two answers to each; a prompt alone in the eager model is the measure."""
    episodes = two_answers_each(loaded)
    assert shares_prompts(loaded, episodes)
    monkeypatch.setattr("cagsr.scoring.scorer.shares_prompts", lambda *_: share)
    scorer = Scorer(loaded, AttentionConfig(layers="all"), SamplingConfig(), 8)
    kept = Kept()
    logprobs = scorer.policy(episodes, kept).logprobs
    across = scorer.image_reader
    assert (across is not None) == (kind_of(loaded) == "mllama")
    for row, answer in enumerate(ANSWERS):
        prompt = encoded(loaded)[row // 2]
        output, width = seeing.alone(loaded, eager, prompt.prompt, answer)
        assert width == len(prompt.ids)
        rows = slice(width - 1, width - 1 + len(answer))
        seen = mean_of(output.attentions, scorer.reader.layers)[rows, :width]
        torch.testing.assert_close(kept.maps[row], seen, atol=2e-5, rtol=1e-4)
        looked = seen if across is None else mean_of(output.attentions, across.layers)[rows]
        places = torch.tensor(prompt.places)
        by_hand = torch.stack([looked[:, places == one].sum(dim=1) for one in range(len(prompt.regions))], dim=1)
        found = kept.regions[row]
        torch.testing.assert_close(found[:, : by_hand.shape[1]], by_hand, atol=2e-5, rtol=1e-4)
        assert not found[:, by_hand.shape[1] :].any()
        said = output.logits[0, rows].log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[row, : len(answer)], said, atol=2e-4, rtol=1e-4)


def mean_of(attentions: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    """``(queries, keys)``, over layers and heads."""
    return torch.stack([attentions[layer][0].mean(dim=0) for layer in layers]).mean(dim=0)


def test_only_the_language_model_is_read(loaded: LoadedModel) -> None:
    scorer = Scorer(loaded, AttentionConfig(layers="all"), SamplingConfig(), 8)
    names = {module: name for name, module in loaded.model.named_modules()}
    readers = [scorer.reader, *([scorer.image_reader] if scorer.image_reader else [])]
    for reader in readers:
        assert all("language_model" in names[one] or "text_model.layers" in names[one] for one in reader._layers)
        assert not any("vision" in names[one] or "visual" in names[one] for one in reader._layers)


def test_what_is_decoded_is_what_is_scored(loaded: LoadedModel) -> None:
    """Rows of other lengths leave at other times; one prompt has no image, where a model takes such."""
    prompts = encoded(loaded)
    if kind_of(loaded) not in ("mllama", "paligemma"):
        prompts += encode_texts(["the small bird"], loaded.tokenizer, WORDS, 200, vision=loaded.vision)
    torch.manual_seed(3)
    found = sample_responses(loaded, prompt_batch(loaded, prompts, 3), SamplingConfig(max_new_tokens=7))
    assert loaded.vision is not None
    assert not (found.ids == loaded.vision.token_id).any()
    readings = Scorer(loaded, AttentionConfig(), SamplingConfig(), 4).policy(found)
    assert found.decoded_logprobs is not None
    drawn = readings.logprobs - readings.sampling_correction
    torch.testing.assert_close(drawn, found.decoded_logprobs, atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_transformers(loaded: LoadedModel, eager: Any) -> None:
    [_, prompt] = encoded(loaded)
    assert loaded.vision is not None
    made = seeing.read_alone(loaded, prompt.prompt)
    said = eager.generate(**made, do_sample=False, max_new_tokens=6, suppress_tokens=[loaded.vision.token_id])
    batch = prompt_batch(loaded, encoded(loaded))  # padded beside the other
    found = sample_responses(loaded, batch, SamplingConfig(temperature=0.0, max_new_tokens=6))
    assert found.ids[1][found.real[1]].tolist() == said[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("loaded", ["paligemma"], indirect=True)
def test_a_text_is_laid_out_once(loaded: LoadedModel, tmp_path: Path) -> None:
    """PaliGemma's processor puts in a BOS and a new line; a prompt's text has them from the start, and they are no words of it."""
    text, images = "tell me <image> about <image> the cat", [seeing.picture("red"), seeing.picture("blue")]
    assert loaded.vision is not None
    made = PaliGemmaProcessor.__call__(
        PaliGemmaProcessor(loaded.vision.processor.image_processor, loaded.tokenizer), text=[text], images=[images]
    )
    [prompt] = encode_texts([text], loaded.tokenizer, WORDS, 200, images=[images], vision=loaded.vision)
    assert list(prompt.ids) == made["input_ids"][0]
    assert prompt.prompt.text == "tell me <image> about <image><bos> the cat\n"
    words = [prompt.prompt.text[start:end] for start, end in sorted(prompt.prompt.template)]
    assert words == ["<image>", "<image>", "<bos>", "\n"]
    again = encode_texts([prompt.prompt.text], loaded.tokenizer, WORDS, 200, images=[images], vision=loaded.vision)
    assert again[0].ids == prompt.ids
    with pytest.raises(DataError, match="the prompt has no image, and a paligemma model takes none without"):
        encode_texts(["the cat"], loaded.tokenizer, WORDS, 200, vision=loaded.vision)
    blind = Path(shutil.copytree(loaded.path, tmp_path / "blind"))
    (blind / "processor_config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no processor beside it .* takes no prompt without one"):
        load_model(ModelConfig(str(blind), device="cpu"))


def test_tensors_are_the_processors_own_for_a_batch(loaded: LoadedModel) -> None:
    """Made prompt by prompt and put together, they are what the processor makes of all prompts at once."""
    assert loaded.vision is not None
    batch = prompt_batch(loaded, encoded(loaded), 3)
    assert batch.images is not None
    assert batch.images[0] is batch.images[2] is not batch.images[3]
    processor = loaded.vision.processor
    texts = [one.prompt.text for one in encoded(loaded)]
    special = {} if kind_of(loaded) != "mllama" else {"add_special_tokens": False}
    made = processor(
        text=texts, images=images_of(loaded), return_tensors="pt", padding=True, padding_side="left", **special
    )
    assert torch.equal(batch.ids[::3], made["input_ids"])
    ours = stacked(batch.images[::3])
    assert {"pixel_values"} <= set(ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, made[name]), name


def test_images_of_a_shared_prompt_are_encoded_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = loaded.model.model
    tower = next(getattr(inner, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(inner, name))
    seen: list[int] = []
    tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    episodes = two_answers_each(loaded)
    for share in (True, False):
        monkeypatch.setattr("cagsr.scoring.scorer.shares_prompts", lambda *_, share=share: share)
        Scorer(loaded, AttentionConfig(), SamplingConfig(), 8).policy(episodes)
    tower._forward_pre_hooks.clear()
    assert seen[1] == 2 * seen[0]


@pytest.mark.parametrize("loaded", ["qwen2_5_vl", "mllama"], indirect=True)
def test_the_probe_notices_what_is_wrong_behind_a_prefix(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen: positions that count tokens, as a text's do, where an image has fewer. Mllama: tiles that are padding are seen."""
    episodes, right = two_answers_each(loaded), ImageArguments.of_forward
    known = sharing._KNOWN.pop(loaded.model, None)

    def wrong(self: ImageArguments, *where: Any, with_images: bool) -> dict[str, Any]:
        return right(self, *where, with_images=with_images) if with_images else {}

    monkeypatch.setattr(ImageArguments, "of_forward", wrong)
    assert not shares_prompts(loaded, episodes)
    sharing._KNOWN.pop(loaded.model)
    if known is not None:
        sharing._KNOWN[loaded.model] = known
