"""The attention reward as a custom reward function of OpenRLHF, which imports this file by its path and calls ``reward_func``.

It does so (``--reward.remote_url``, formerly ``--remote_rm_url``) from threads of a process without the policy, so the
attention is that of a frozen model (:mod:`cagsr.integrations.frozen`).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.integrations.frozen import FrozenScorer, frozen_scorer
from cagsr.models.continuation import encode_continuation
from cagsr.scoring.answers import Response, stop_token


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **kwargs: Any
) -> dict[str, Tensor | dict[str, Tensor]]:
    """Score answers: ``queries`` are prompt and answer as one text each, ``prompts`` texts after the chat template.

    ``config`` among the ``kwargs`` is the path of the YAML file; else the environment variable ``CAGSR_REWARD_CONFIG``.

    Returns ``rewards`` ``(answers,)`` float32, the weighted sums of the terms (raw, or on a run's scales); ``scores``, the same
    (no shares between 0 and 1: leave dynamic filtering off); ``extra_logs``, each term by its name, ``(answers,)``. Raises
    DataError for a query that does not begin with its prompt, or a prompt that is not in the data or can't be used;
    ConfigError, ModelError, RunError where the settings, the model or the run can't be used.
    """
    scorer = frozen_scorer(kwargs.get("config"))
    loaded, encoded, responses = scorer.loaded, [], []
    for row, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        # OpenRLHF puts no BOS before a prompt.
        asked = scorer.encoder.encode_rendered(_known(scorer, row, prompt), add_special_tokens=False)
        answer = tuple(_answer(loaded.tokenizer, query, prompt, asked)) or (stop_token(loaded, asked),)
        encoded.append(asked)
        responses.append(Response(loaded.text_of(answer), answer, answer[-1] in loaded.stop_ids))
    rewards, terms = scorer.terms(encoded, responses)
    return {"rewards": rewards, "scores": rewards.clone(), "extra_logs": dict(terms)}


def _known(scorer: FrozenScorer, row: int, prompt: str) -> Prompt:
    """The prompt of the data that renders to this text: it knows which words are the template's."""
    if (found := scorer.known.get(prompt)) is not None:
        return found
    if not scorer.known and getattr(scorer.loaded.tokenizer, "chat_template", None) is None:
        return Prompt(row + 1, prompt)
    # Taken as it is, the template's words would count as the prompt's rarest.
    raise DataError(
        f"the prompt {prompt[:60]!r} is none of data.path ({scorer.encoder.source}), as text, as a conversation, or as the "
        "message of a user: the chat template's words can't be told from its own. Name a file there that holds all "
        "prompts, those of the evaluation too (OpenRLHF's input_template can't be used)."
    )


def _answer(tokenizer: Any, query: str, prompt: str, encoded: EncodedPrompt) -> list[int]:
    """The tokens that the rest of the text adds to the prompt's own."""
    for before in (prompt, tokenizer.decode(list(encoded.ids), skip_special_tokens=False)):
        if query.startswith(before):
            return encode_continuation(tokenizer, before, query[len(before) :])
    raise DataError(
        f"the query {query[:60]!r} does not begin with its prompt {prompt[:60]!r}: was the prompt cut? Raise the longest "
        "prompt, or drop long ones."
    )
