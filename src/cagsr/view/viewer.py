"""The viewer from Python: an object that a notebook shows, and that saves itself as a page or a picture."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cagsr.config import AttentionConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig, validate
from cagsr.errors import ConfigError, DataError
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.association import Associations
from cagsr.reward.learn_probe import named_probe
from cagsr.reward.weigh import Scales
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.scoring.answers import Response, encode_response
from cagsr.support.atomic import write_text_atomically
from cagsr.support.extras import require
from cagsr.view.measure import Measured, measure
from cagsr.view.view_html import render_page


@dataclass(frozen=True)
class View:
    """What the answers to a prompt looked at; the last line of a notebook's cell shows it."""

    measured: Measured
    """The numbers: prompt, answers (the best first), terms, attention."""

    @cached_property
    def html(self) -> str:
        """The page, one self-contained HTML document."""
        return render_page(self.measured)

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame of its own that can reach nothing outside it."""
        return (
            '<iframe title="What the answers looked at" sandbox="allow-scripts" '
            'style="width:100%;height:760px;border:0;border-radius:8px" '
            f'srcdoc="{html.escape(self.html, quote=True)}"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, and return its path; raises RunError where it can't be written."""
        write_text_atomically(Path(path), self.html)
        return Path(path)

    def save_png(self, path: str | Path) -> Path:
        """Write a heat map (answer tokens by prompt tokens) with the terms as bars, and return its path.

        Raises ConfigError without matplotlib, RunError where the file can't be written.
        """
        require("The heat map", "pages", modules=["matplotlib"])
        from cagsr.view.heat_map import save_picture

        save_picture(self.measured, Path(path))
        return Path(path)


def view(
    model: LoadedModel | ModelConfig | str,
    prompt: str | Sequence[Mapping[str, str]] | EncodedPrompt,
    answers: int | str | Sequence[str | Response] = 4,
    *,
    reward: RewardConfig | None = None,
    attention: AttentionConfig | None = None,
    salience: SalienceConfig | None = None,
    frequency: DocumentFrequency | None = None,
    associations: Associations | None = None,
    scales: Scales | None = None,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    images: Sequence[Any] = (),
    audio: Any = None,
) -> View:
    """See what answers to a prompt looked at and what each term of the reward gave them.

    ``images`` are the prompt's: files' paths or PIL images; ``audio`` is its sound: a file's path, or samples with their rate
    ``{"array", "sampling_rate"}``. ``answers`` are how many to sample (as ``sampling`` says, with
    ``seed``), or the answers themselves. Settings that are None are the defaults. Words are counted in ``frequency``, that of a
    run or a prompt set; None: in this prompt alone, so that all words weigh alike. Without ``associations`` the terms that read
    them are left out; without a run's ``scales`` those of these answers are used. The temperature of ``sampling`` also divides
    the logits for self-certainty. Raises ConfigError for no answers, or settings that can't be used; DataError for a prompt that
    can't be used, an answer of zero tokens, or one too long for the model's context; ModelError where the model can't be loaded
    or its attention can't be read.
    """
    reward = reward or RewardConfig()
    validate(reward, "reward.")
    if isinstance(answers, str):
        answers = [answers]
    if answers == 0 or (not isinstance(answers, int) and len(answers) == 0):
        raise ConfigError("There are no answers to view: give one or more, or how many to sample.")
    if isinstance(answers, int) and answers < 0:
        raise ConfigError(f"{answers} answers can't be sampled: give 1 or more.")
    if isinstance(model, str):
        model = ModelConfig(model)
    loaded = load_model(model, for_training=False) if isinstance(model, ModelConfig) else model
    sampling = sampling or SamplingConfig()
    salience = salience or SalienceConfig()
    if not isinstance(prompt, EncodedPrompt):
        room = loaded.room_for_prompts(sampling.max_new_tokens if isinstance(answers, int) else 0)
        prompt = encode_texts(
            [prompt],
            loaded.tokenizer,
            salience,
            room,
            frequency,
            source="the prompt",
            images=[images],
            audio=[audio],
            vision=loaded.vision,
        )[0]
    scorer = AnswerScorer(
        loaded,
        reward,
        attention or AttentionConfig(),
        salience,
        temperature=sampling.temperature,
        micro_batch_size=8,
        associations=associations,
        frequency=frequency,
        probe=named_probe(reward),
    )
    if isinstance(answers, int):
        responses = sampled(loaded, prompt, replace(sampling, num_generations=answers), seed)
    else:
        responses = typed(loaded, prompt, answers)
    return View(measure(loaded, prompt, responses, scorer, scales))


def sampled(loaded: LoadedModel, prompt: EncodedPrompt, sampling: SamplingConfig, seed: int) -> list[Response]:
    """Sample ``sampling.num_generations`` answers to a prompt; the global random generators are left as they were."""
    (_, rollout), *_ = sample_in_batches(loaded, [prompt], sampling, seed, 1)
    return [
        Response(text, tuple(rollout.ids[row][rollout.sampled[row]].tolist()), bool(rollout.ended[row]))
        for row, text in enumerate(rollout.completions)
    ]


def typed(loaded: LoadedModel, prompt: EncodedPrompt, answers: Sequence[str | Response]) -> list[Response]:
    """Encode answers that were given; raises DataError for one of zero tokens, or too long for the model with the prompt."""
    context = loaded.pair_context()
    responses = []
    for number, answer in enumerate(answers, start=1):
        response = answer if isinstance(answer, Response) else encode_response(loaded, prompt, answer)
        if not response.ids:
            raise DataError(f"Answer {number} has zero tokens; give it a text, or leave it out.")
        # The last token of an answer is never fed: nothing follows it.
        total = len(prompt.ids) + len(response.ids) - 1
        if context is not None and total > context:
            raise DataError(
                f"Prompt and answer {number} have {total + 1} tokens, more than the model's context of {context}; shorten them."
            )
        responses.append(response)
    return responses
