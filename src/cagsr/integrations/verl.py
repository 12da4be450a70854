"""The attention reward as a custom reward function of verl, which imports this file by its path and calls ``compute_score``.

It does so (``reward.custom_reward_function.path``) for one answer at a time, in a process without the policy, so the attention
is that of a frozen model (:mod:`cagsr.integrations.frozen`).
"""

from collections.abc import Mapping
from typing import Any

from cagsr.errors import DataError
from cagsr.integrations.frozen import frozen_scorer


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Score one answer, ``solution_str``, without special tokens; whether it was cut can't be seen, labels make no difference.

    ``extra_info`` must hold the prompt, as text or messages, because verl does not hand it over otherwise. The ``kwargs`` are
    ``reward.custom_reward_function.reward_kwargs``: ``config``, the path of the YAML file (else the environment variable
    ``CAGSR_REWARD_CONFIG``), and ``prompt_key``, the prompt's name in ``extra_info`` (``prompt``).

    Returns ``score``, the weighted sum of the terms (raw, or on the scales of the run that ``reward_from`` names), and each raw
    term by its name, which verl logs. Raises DataError for no prompt in ``extra_info``, or one that can't be used; ConfigError,
    ModelError, RunError where the settings, the model or the run can't be used.
    """
    key = str(kwargs.get("prompt_key", "prompt"))
    prompt = None if extra_info is None else extra_info.get(key)
    if prompt is None or not len(prompt):
        raise DataError(
            f"data source {data_source}: extra_info holds no '{key}': put the prompt (text or messages) there when you prepare "
            "the data, or name the key with reward_kwargs.prompt_key."
        )
    scorer = frozen_scorer(kwargs.get("config"))
    # Parquet gives lists as arrays.
    encoded = scorer.encoder.encode(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])
    total, terms = scorer.terms([encoded], [scorer.response(encoded, solution_str)])
    return {"score": float(total[0]), **{name: float(values[0]) for name, values in terms.items()}}
