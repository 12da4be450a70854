"""How different a model's answers are: among those to one prompt, and over the whole set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cagsr.evaluation.metrics import distinct, words


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
    """Self-BLEU (Zhu et al., 2018, "Texygen") of the answers to one prompt; between 0 and 1, lower is more diverse.

    The mean over the answers of BLEU-n against all the others as references (nltk's sentence BLEU, smoothing method 1 of
    Chen & Cherry, 2014: an order without a match counts as 0.1 matches), on lower-case words without punctuation. Orders
    longer than an answer are left out for it. Answers without a word are left out; NaN with fewer than two left.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    tokens = [found for found in (words(text) for text in texts) if found]
    if len(tokens) < 2:
        return float("nan")
    smoothing = SmoothingFunction().method1
    scores = []
    for number, hypothesis in enumerate(tokens):
        others = tokens[:number] + tokens[number + 1 :]
        order = min(n, len(hypothesis))
        scores.append(sentence_bleu(others, hypothesis, [1 / order] * order, smoothing))
    return float(np.mean(scores))


def distinct_of_draws(texts: Sequence[str], samples: int, n: int) -> float:
    """distinct-n of one answer to each prompt, averaged over the ``samples`` draws, so that their number changes nothing.

    ``texts`` holds ``samples`` answers to each prompt in a row. It is a property of the set: it falls as the set grows, so
    that only sets of the same prompts can be compared, and resampling prompts with replacement would repeat their words
    and put the whole bootstrap interval below the value itself. So it comes without an interval.
    """
    return float(np.mean([distinct(texts[draw::samples], n) for draw in range(samples)]))
