"""A request's prompt as tokens, and how long its answer may be."""

import copy
from collections.abc import Callable
from dataclasses import replace

from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt
from cagsr.models.load import UNLIMITED, LoadedModel
from cagsr.models.pictures import pixels_of
from cagsr.models.vision import Vision
from cagsr.prompts.encode import TextEncoder, encode_asked
from cagsr.prompts.images import pictures_of
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.render import render_prompt
from cagsr.prompts.rows import Row
from cagsr.serving.judges import Judging
from cagsr.serving.prompt_store import PromptText
from cagsr.serving.protocol import ApiError
from cagsr.serving.settings import ServeConfig

SOURCE = "The request"


class Reader:
    """Reads prompts, in one thread; ``judging`` gives the reward of a version, which says what words weigh."""

    def __init__(self, loaded: LoadedModel, config: ServeConfig, judging: Callable[[int], Judging]) -> None:
        self._tokenizer = copy.deepcopy(loaded.tokenizer)  # the engine decodes with the other one meanwhile
        self._vision = None
        if isinstance(loaded.vision, Vision):  # one that hears has been refused
            self._vision = replace(loaded.vision, processor=copy.copy(loaded.vision.processor), path=config.served_name)
            self._vision.processor.tokenizer = self._tokenizer
        self._context = loaded.context_length()
        self._shared = loaded.architecture.shares_context
        self._config, self._judging = config, judging

    def read(self, text: PromptText, judged: int | None, longest: int | None) -> tuple[EncodedPrompt, int]:
        """The prompt, its words weighed as the version ``judged`` weighs them (None: nothing is judged), and the answer's longest
        length where ``longest`` was asked for.

        Raises ApiError: it can't be read, has images that are too many, too large or not for this model, or prompt and answer are
        too long.
        """
        try:
            self._check_images(text)
            encoded = self._plain(text) if judged is None else self._weighed(text, self._judging(judged))
        except DataError as error:
            told = str(error).removeprefix(f"{SOURCE}, row 1").lstrip(":, ")
            raise ApiError(
                400, told[0].upper() + told[1:], param="prompt" if isinstance(text, str) else "messages"
            ) from None
        return encoded, self._longest(len(encoded.ids), longest)

    def _plain(self, text: PromptText) -> EncodedPrompt:
        """Where nothing is judged no word matters, and a prompt may have none ("?")."""
        row = Row(1, SOURCE, {"prompt": text})
        prompt = render_prompt(row, DataConfig(SOURCE), SalienceConfig(), self._tokenizer, self._vision)
        prompt, tokens, _ = encode_asked(prompt, TextEncoder(self._tokenizer), self._vision, f"{SOURCE}, row 1")
        return EncodedPrompt(prompt, tokens.ids, (-1,) * len(tokens.ids), ())

    def _weighed(self, text: PromptText, judging: Judging) -> EncodedPrompt:
        """With the weights of its words."""
        [encoded] = encode_texts(
            [text],
            self._tokenizer,
            judging.salience,
            UNLIMITED,
            judging.frequency,
            source=SOURCE,
            vision=self._vision,
        )
        return encoded

    def _check_images(self, text: PromptText) -> None:
        """Before any pixel is read."""
        row, limits = f"{SOURCE}, row 1", self._config.limits
        pictures = () if isinstance(text, str) else pictures_of(Row(1, SOURCE, {}), text, row)
        if pictures and self._vision is None:
            raise DataError(f"{row}: this model reads no images; leave them out.")
        if len(pictures) > limits.images:
            raise DataError(f"{row}: {len(pictures)} images are more than the {limits.images} that are read.")
        for picture in pictures:
            if (pixels := pixels_of(picture)) > limits.image_pixels:
                raise DataError(
                    f"{picture.name}: {pixels:,} pixels are more than the {limits.image_pixels:,} that are read; make it smaller."
                )

    def _longest(self, tokens: int, longest: int | None) -> int:
        limits, context = self._config.limits, self._context
        room = limits.max_tokens
        most = limits.prompt_tokens
        if context is not None:
            room = min(room, context - tokens if self._shared else context)
            most = min(context - 1 if self._shared else context, most or context)
        if most is not None and tokens > most:
            raise ApiError(
                400,
                f"The prompt has {tokens:,} tokens, more than the {most:,} that can be read; shorten it.",
                code="context_length_exceeded",
            )
        if longest is not None and longest > limits.max_tokens:
            raise ApiError(
                400,
                f"max_tokens: {longest:,} is more than the {limits.max_tokens:,} that may be asked for.",
                param="max_tokens",
            )
        if longest is not None and longest > room:
            raise ApiError(
                400,
                f"The prompt has {tokens:,} tokens and the model's context {context:,}: that leaves {room:,} for an answer, and "
                f"{longest:,} are asked for.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(room, self._config.sampling.max_new_tokens) if longest is None else longest
