"""Measures of finished answers that need their texts alone, as pure functions that share nothing with the reward."""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
import regex

from cagsr.prompts.find_words import UNSPACED

_ALONE = rf"(?=[\p{{L}}\p{{N}}])[{UNSPACED}]\p{{M}}*"
_LETTERS = rf"(?:(?![{UNSPACED}])\w\p{{M}}*)+"
_WORD = regex.compile(rf"{_ALONE}|{_LETTERS}(?:['’-]{_LETTERS})*")
_ROUGE_WORD = regex.compile(rf"{_ALONE}|(?:(?![{UNSPACED}_])\w\p{{M}}*)+")


def words(text: str) -> list[str]:
    """The words of a text, lower case, punctuation dropped; hyphens and apostrophes stay inside words.

    In scripts written without spaces (Chinese, Japanese, Thai, ...) each character is a word.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin, 2004), the best over the references, with Porter stemming; between 0 and 1.

    Of English text the words are those of rouge-score; its own tokenizer drops all other letters. Raises ValueError without
    references.
    """
    return max(rouge(text, references, "rougeL"))


def rouge(text: str, references: Sequence[str], kind: Literal["rouge1", "rouge2", "rougeL"]) -> list[float]:
    """ROUGE F1 against each of the references, as :func:`rouge_l` counts words. Raises ValueError without references."""
    if not references:
        raise ValueError("ROUGE needs at least one reference")
    scorer = _rouge_scorer(kind)
    return [scorer.score(reference, text)[kind].fmeasure for reference in references]


@cache
def _rouge_scorer(kind: str) -> Any:
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    stemmer = PorterStemmer()

    class AllLetters(Tokenizer):
        # The same references are met again and again, at every temperature and for every model.
        @lru_cache(maxsize=2**16)  # noqa: B019 (there is one a kind, for ever)
        def tokenize(self, text: str) -> list[str]:
            found = _ROUGE_WORD.findall(unicodedata.normalize("NFC", text).lower())
            return [stemmer.stem(word) if word.isascii() and len(word) > 3 else word for word in found]

    return RougeScorer([kind], tokenizer=AllLetters())


def repetition(text: str, n: int = 3) -> float:
    """Share of an answer's word n-grams that it has said before, ``1 - distinct / all``; 0 below n words."""
    grams = _ngrams(words(text), n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """distinct-n (Li et al., 2016, section 5): different word n-grams of the set over all of them; 0 where none."""
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_of_draws(texts: Sequence[str], samples: int, n: int) -> float:
    """distinct-n of one answer to each prompt, averaged over the ``samples`` draws, so that their number changes nothing.

    ``texts`` holds ``samples`` answers to each prompt in a row. It is a property of the set: it falls as the set grows, so
    that only sets of the same prompts can be compared, and resampling prompts with replacement would repeat their words and
    put the whole bootstrap interval below the value itself. So it comes without an interval.
    """
    return float(np.mean([distinct(texts[draw::samples], n) for draw in range(samples)]))


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


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def word_weights(prompts: Sequence[str], floor: float = 0.1) -> dict[str, float]:
    """How much each word of a prompt set tells: ``log(prompts / prompts with the word)``, at most ``log(prompts)``.

    Words whose weight is below ``floor`` of the largest weigh nothing: a template's words, and most function words.
    A set in which every prompt has the same words (a single prompt, too) weighs them all 1.
    """
    counts = Counter(word for prompt in prompts for word in set(words(prompt)))
    weights = {word: math.log(len(prompts) / count) for word, count in counts.items()}
    largest = max(weights.values(), default=0.0)
    if largest == 0.0:
        return dict.fromkeys(weights, 1.0)
    return {word: weight if weight >= floor * largest else 0.0 for word, weight in weights.items()}


def lexical_relevance(prompt: str, answer: str, weights: Mapping[str, float] | None = None) -> float:
    """Weighted share of the prompt's words that the answer uses; between 0 and 1, 0 where no word has weight.

    ``weights`` come from ``word_weights`` over the prompt set; without them every word counts 1. A word that the set
    doesn't have counts as its largest weight.
    """
    wanted = set(words(prompt))
    unknown = max(weights.values(), default=1.0) if weights else 1.0
    weight = {word: weights.get(word, unknown) if weights is not None else 1.0 for word in wanted}
    total = sum(weight.values())
    said = set(words(answer))
    return sum(value for word, value in weight.items() if word in said) / total if total else 0.0
