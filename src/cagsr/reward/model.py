"""A sequence-classification reward model as a term."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cagsr.errors import ModelError, RewardError
from cagsr.flow import Prompt, RewardBatch
from cagsr.models.files import check_files, check_safetensors, is_adapter, loading, weights_problem
from cagsr.models.lengths import length_borders
from cagsr.prompts.answer_text import answered_messages
from cagsr.prompts.chat import apply_template
from cagsr.prompts.encode import once_special
from cagsr.reward.values import quote_prompt
from cagsr.support.progress import each, working

_CLOSING = frozenset(".,;:!?)]}%…’”»")
_OPENING = frozenset("([{‘“«")


@dataclass(frozen=True)
class RewardModel:
    """The score of a reward model for prompt + answer, written with the reward model's own tokenizer."""

    needs: ClassVar[frozenset[str]] = frozenset()
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    """Longest text in tokens, None where the model states no limit."""
    batch_size: int = 16

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)`` float32 scores; raises as :meth:`score`."""
        scores = self.score(batch.episodes.prompts.prompts, batch.episodes.completions)
        return scores.to(batch.episodes.ids.device)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Tensor:
        """Return ``(answers,)`` float32 scores on the CPU, one prompt for each answer.

        Conversational prompts go through the reward model's chat template, plain prompts are joined with the answer.
        RewardError: a text is longer than it can read; ModelError: conversational prompts, and its tokenizer has no chat
        template.
        """
        ids = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        # Texts of like length together: less padding, and the scores do not depend on the order.
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        scores, pad = torch.zeros(len(ids), dtype=torch.float32), int(self.tokenizer.pad_token_id)
        with torch.no_grad():
            for start in each(f"scoring by {self.name}", range(0, len(order), self.batch_size), "batches"):
                rows = order[start : start + self.batch_size]
                width = max(len(ids[row]) for row in rows)
                padded = torch.tensor([ids[row] + [pad] * (width - len(ids[row])) for row in rows])
                mask = torch.tensor([[1] * len(ids[row]) + [0] * (width - len(ids[row])) for row in rows])
                device = self.model.device
                logits = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
                scores[rows] = logits[:, 0].float().cpu()
        return scores

    def _encode(self, prompt: Prompt, completion: str) -> list[int]:
        if prompt.messages is not None and self.tokenizer.chat_template is None:
            raise ModelError(
                f"reward model {self.name!r} has no chat template, but the prompts are chat messages: use plain "
                "prompts, or save the reward model's tokenizer with a chat template"
            )
        ids = encode_answered(prompt, completion, self.tokenizer)
        if not ids:
            raise RewardError(f"reward model {self.name!r} gets an empty text for {quote_prompt(prompt)}")
        if self.max_length is not None and len(ids) > self.max_length:
            raise RewardError(
                f"reward model {self.name!r} reads at most {self.max_length} tokens, but {quote_prompt(prompt)} and "
                f"its answer have {len(ids)}: shorten the prompts (data.max_prompt_length) or the answers "
                "(sampling.max_new_tokens)"
            )
        return ids


def encode_answered(prompt: Prompt, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of an answered prompt that a reward model reads, the same in its training and when it scores.

    A conversation goes through the tokenizer's chat template, which writes its special tokens; a plain prompt is joined
    with its answer (``join_answer``) and gets the tokenizer's own. No end token is added to plain text: a sampled
    answer comes as text, without the token that ended it. Prompt and answer are one text here, not tokens behind other
    tokens as for a policy: nobody writes behind the prompt, and a classifier was made for texts.
    """
    if prompt.messages is None:
        text = join_answer(prompt.text, answer)
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        return ids[once_special(text, ids, tokenizer)]
    chat = answered_messages(prompt.messages, [{"role": "assistant", "content": answer}])
    text = apply_template(chat, tokenizer, prompt.columns, f"row {prompt.row}", opened=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # the template wrote them


def join_answer(prompt: str, answer: str) -> str:
    """Put a plain prompt and its answer together, with a space between two words that would else become one.

    Tokenizers in the manner of SentencePiece lose an answer's first space when they decode it, and people write answers
    without one. No space is put before closing punctuation, after an opening bracket or quote, or next to scripts
    written without spaces.
    """
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return prompt + answer
    wide = any(unicodedata.east_asian_width(character) in ("W", "F") for character in (prompt[-1], answer[0]))
    if answer[0] in _CLOSING or prompt[-1] in _OPENING or wide:
        return prompt + answer
    return f"{prompt} {answer}"


@working("loading a reward model")
def load_reward_model(path: str, device: torch.device | str, name: str | None = None) -> RewardModel:
    """Load a reward model and its tokenizer: a sequence-classification model with one output, safetensors weights.

    ``name`` is the term's; None: the last part of the path. ModelError: no such path, only pickled weights, no sequence
    classifier with one output, no trained head, or no usable tokenizer.
    """
    what = f"reward.models: {path}"
    check_files(path, what)
    if is_adapter(path):
        raise ModelError(
            f"{what} is a PEFT adapter; give the folder of the merged reward model (cagsr reward-model writes it "
            "beside its adapter)"
        )
    check_safetensors(path, what)
    with loading(f"{what} can't be loaded as a sequence-classification model"):
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if config.num_labels != 1:
            raise ModelError(
                f"{what} has {config.num_labels} outputs; give a sequence-classification model with one (num_labels=1)"
            )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            # A CPU computes below float32 slowly, and rounds every sum.
            dtype=torch.float32 if torch.device(device).type == "cpu" else "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if (problem := weights_problem(info)) is not None:
        raise ModelError(f"{what} is no trained reward model: {problem}")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"reward.models: the tokenizer of {path} has neither a PAD nor an EOS token: add a PAD token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    # Decoder classifiers read their score at the last token that is not PAD: both must mean the same token.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.to(device).eval().requires_grad_(False)
    length_borders(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < 10**9]
    return RewardModel(name or path.rstrip("/").rpartition("/")[2], model, tokenizer, min(limits, default=None))
