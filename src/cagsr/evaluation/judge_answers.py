"""Everything that is measured of a finished answer, by judges that share nothing with the reward."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cagsr.errors import ConfigError, ModelError
from cagsr.evaluation.held_out import call_checked
from cagsr.evaluation.intervals import Floats
from cagsr.evaluation.judges import Judges
from cagsr.evaluation.metrics import lexical_relevance, repetition, rouge_l, word_weights, words
from cagsr.evaluation.perplexity import follow_up_nll, load_judge
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.models.sentence_encoder import Encoder, load_encoder
from cagsr.prompts.references import FOLLOW_UP_COLUMNS, REFERENCE_COLUMNS, column_texts, first_column, prompt_words
from cagsr.reward.model import load_reward_model
from cagsr.support.dotted_path import import_function
from cagsr.support.extras import has_extra, install_command
from cagsr.support.progress import working

BUILT_IN = (
    *("rouge_l", "lexical_relevance", "embedding_relevance", "follow_up_perplexity", "follow_up_nll", "reward_model"),
    *("repetition", "words"),
    *("tokens", "ended", "entropy", "self_bleu", "win_rate"),  # added by whoever samples or compares the answers
)
"""Names of measures that a checker can't take."""


class AnswerJudge:
    """Loads the judges once and measures answers as often as asked; models run on ``device``.

    Raises ConfigError for a checker that can't be imported or if sentence-transformers is missing, ModelError for a model that
    can't be loaded.
    """

    def __init__(self, judges: Judges, device: torch.device | str = "cpu") -> None:
        self.judges = judges
        self._checker = None if judges.checker is None else import_function(judges.checker, "--checker")
        self._encoder = None if judges.embedding_model is None else load_encoder(judges.embedding_model, device)
        self._judge = None if judges.judge_model is None else load_judge(judges.judge_model, device)
        self._reward_model = None
        if judges.reward_model is not None:
            try:
                self._reward_model = load_reward_model(judges.reward_model, device)
            except ModelError as error:
                raise ModelError(str(error).replace("reward.models:", "--reward_model:")) from error

    @working("judging the answers")
    def measure(self, prompts: Sequence[EncodedPrompt], completions: Sequence[str]) -> dict[str, Floats]:
        """Measure answers, one prompt (its text and its columns) for each: name -> ``(answers,)`` float64.

        Always: ``lexical_relevance`` (words weighted over the prompts handed in), ``repetition`` (3-grams), ``words``.
        With references in the rows (and the extra nltk): ``rouge_l``. With the judges: the checker's own names (for plain
        numbers the name of the function), ``embedding_relevance``, ``follow_up_perplexity`` and its logarithm
        ``follow_up_nll``, ``reward_model`` (its raw score). NaN where the row lacks what the measure needs.

        Raises ConfigError for a checker that fails, or gives something other than one number or dict for each answer, or if
        ``follow_up_column`` is in no row, DataError for a reference of an unknown form, ModelError for a text too long.
        """
        rows = [encoded.prompt for encoded in prompts]
        texts = [prompt_words(prompt) for prompt in rows]
        found = {} if self._checker is None else self._check(rows, completions)
        references = column_texts(rows, first_column(rows, REFERENCE_COLUMNS))
        if any(references) and has_extra("nltk"):
            found["rouge_l"] = np.array(
                [rouge_l(text, own) if own else np.nan for text, own in zip(completions, references, strict=True)]
            )
        weights = word_weights(list(dict.fromkeys(texts)))
        pairs = list(zip(texts, completions, strict=True))
        found["lexical_relevance"] = np.array([lexical_relevance(prompt, text, weights) for prompt, text in pairs])
        if self._encoder is not None:
            found["embedding_relevance"] = embedding_relevance(self._encoder, texts, completions)
        if self._judge is not None:
            own = column_texts(rows, self._follow_up_column(rows))
            nll = follow_up_nll(self._judge, rows, completions, [texts[0] if texts else None for texts in own])
            if np.isfinite(nll).any():
                found |= {"follow_up_perplexity": np.exp(nll), "follow_up_nll": nll}
        if self._reward_model is not None:
            found["reward_model"] = self._reward_model.score(rows, completions).double().numpy()
        found["repetition"] = np.array([repetition(text) for text in completions])
        found["words"] = np.array([float(len(words(text))) for text in completions])
        return found

    def left_out(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        """What is not measured of answers to these prompts, and why, in a few words each."""
        rows = [encoded.prompt for encoded in prompts]
        lacking = []
        if first_column(rows, REFERENCE_COLUMNS) is None:
            lacking.append("ROUGE-L (no row has references, reference or completion)")
        elif not has_extra("nltk"):
            lacking.append(f"ROUGE-L ({install_command('nltk')})")
        if self._checker is None:
            lacking.append("the task's own checks (no --checker)")
        if self._encoder is None:
            lacking.append("embedding relevance (no --embedding_model)")
        if self._judge is None:
            lacking.append("follow-up perplexity (no --judge_model)")
        elif self._follow_up_column(rows) is None:
            lacking.append(f"follow-up perplexity (no row has {', '.join(FOLLOW_UP_COLUMNS)})")
        return lacking

    def _follow_up_column(self, rows: Sequence[Prompt]) -> str | None:
        column = self.judges.follow_up_column
        if column is None:
            return first_column(rows, FOLLOW_UP_COLUMNS)
        if first_column(rows, [column]) is None:
            raise ConfigError(f"--follow_up_column {column}: no row has anything in it; name another column.")
        return column

    def _check(self, rows: Sequence[Prompt], completions: Sequence[str]) -> dict[str, Floats]:
        """The checker's values as one array for each name; None and names that an answer lacks become NaN."""
        path = f"--checker {self.judges.checker}:"
        assert self._checker is not None
        returns = "a number, or a dict of numbers, for each answer"
        values = call_checked(self._checker, rows, completions, path, returns, "answers")
        own = str(self.judges.checker).rpartition(".")[2]
        named = [value if isinstance(value, Mapping) else {own: value} for value in values]
        found: dict[str, Floats] = {}
        for name in dict.fromkeys(str(key) for value in named for key in value):
            if name in BUILT_IN:
                raise ConfigError(f"{path} '{name}' is the name of a measure of ours; give it another name.")
            column = [value.get(name) for value in named]
            try:
                found[name] = np.array([np.nan if one is None else float(one) for one in column])
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path} '{name}' holds something that is no number ({error}).") from error
            if np.isinf(found[name]).any():
                raise ConfigError(f"{path} '{name}' is infinite for an answer; give a finite number or None.")
        return found


@working("embedding the answers")
def embedding_relevance(encoder: Encoder, prompts: Sequence[str], answers: Sequence[str]) -> Floats:
    """Cosine of each prompt's and its answer's embedding, ``(answers,)`` float64, between -1 and 1.

    NaN for an answer without a character that isn't white space. Texts longer than the encoder reads are cut by it. Equal
    texts are embedded once.
    """
    texts = list(dict.fromkeys([*prompts, *answers]))
    vectors = np.asarray(encoder.encode(texts, batch_size=64, show_progress_bar=False), dtype=np.float64)
    place = {text: number for number, text in enumerate(texts)}
    first = vectors[[place[text] for text in prompts]]
    second = vectors[[place[text] for text in answers]]
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    said = np.array([bool(text.strip()) for text in answers]) & (lengths > 0)
    return np.where(said, (first * second).sum(axis=1) / np.where(lengths > 0, lengths, 1.0), np.nan)
