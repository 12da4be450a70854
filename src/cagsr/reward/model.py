"""A sequence-classification reward model as a term."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from cagsr.reward.values import quote_prompt

_CLOSING = frozenset(".,;:!?)]}%…’”»")
_OPENING = frozenset("([{‘“«")

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class RewardModel:
    """The score of a reward model for prompt + answer, written with the reward model's own tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    """Longest text in tokens, None where the model states no limit."""
    batch_size: int = 16

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)`` float32 scores.

        Conversational prompts go through the reward model's chat template, plain prompts are joined with the answer.

        Raises:
            RewardError: a text is longer than the reward model can read.
            ModelError: conversational prompts, and its tokenizer has no chat template.
        """
        scores = self.score(batch.rollout.prompts.prompts, batch.rollout.completions)
        return scores.to(batch.rollout.response_mask.device)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Tensor:
        """Return ``(answers,)`` float32 scores on the CPU, one prompt for each answer. Raises as a call does."""
        ids = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        # Texts of like length together: less padding, and the scores do not depend on the order.
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        scores = torch.zeros(len(ids), dtype=torch.float32)
        with torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                width = max(len(ids[row]) for row in rows)
                pad = int(self.tokenizer.pad_token_id)
                padded = torch.tensor([ids[row] + [pad] * (width - len(ids[row])) for row in rows])
                mask = torch.tensor([[1] * len(ids[row]) + [0] * (width - len(ids[row])) for row in rows])
                logits = self.model(
                    input_ids=padded.to(self.model.device), attention_mask=mask.to(self.model.device)
                ).logits
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
    answer comes as text, without the token that ended it.
    """
    if prompt.messages is None:
        return list(tokenizer(join_answer(prompt.text, answer), verbose=False)["input_ids"])
    text = tokenizer.apply_chat_template(answered_chat(prompt.messages, answer), tokenize=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # the template wrote them


def answered_chat(messages: Sequence[Mapping[str, Any]], answer: str) -> list[dict[str, Any]]:
    """A conversation with its answer: the assistant's next message, or the rest of the one that the prompt begins."""
    chat = [dict(message) for message in messages]
    if chat[-1]["role"] == "assistant":
        return [*chat[:-1], chat[-1] | {"content": chat[-1]["content"] + answer}]
    return [*chat, {"role": "assistant", "content": answer}]


def join_answer(prompt: str, answer: str) -> str:
    """Put a plain prompt and its answer together, with a space between two words that would else become one.

    Tokenizers in the manner of SentencePiece lose an answer's first space when they decode it, and people write answers
    without one. No space is put before closing punctuation, after an opening bracket or quote, or next to scripts
    written without spaces.
    """
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return prompt + answer
    if answer[0] in _CLOSING or prompt[-1] in _OPENING or _is_wide(prompt[-1]) or _is_wide(answer[0]):
        return prompt + answer
    return f"{prompt} {answer}"


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in ("W", "F")


def load_reward_model(path: str, device: torch.device | str, name: str | None = None) -> RewardModel:
    """Load a reward model and its tokenizer.

    Args:
        path: folder or Hub id of a sequence-classification model with one output, safetensors weights.
        device: where it runs.
        name: name of the term; None: the last part of the path.

    Raises:
        ModelError: the path does not exist, holds only pickled weights, is not a sequence classifier with one output,
            lacks a trained head, or has no usable tokenizer.
    """
    folder = Path(path)
    looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ModelError(f"reward.models: {path}: no such folder; give a folder in Hugging Face layout or a Hub id")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if any(file for pattern in PICKLES for file in folder.glob(pattern)):
            raise ModelError(
                f"reward.models: {path} holds only pickled weights, which can run code when opened and are never "
                "loaded: convert them to safetensors in a place you trust (model.save_pretrained)"
            )
        raise ModelError(f"reward.models: {path} holds no *.safetensors weights")
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if config.num_labels != 1:
            raise ModelError(
                f"reward.models: {path} has {config.num_labels} outputs; give a sequence-classification model with one "
                "(num_labels=1)"
            )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            # A CPU computes below float32 slowly, and rounds every sum.
            dtype=torch.float32 if torch.device(device).type == "cpu" else "auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"reward.models: {path} can't be loaded as a sequence-classification model ({reason})"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise ModelError(
            f"reward.models: {path} has no weights for {missing!r}, so its scores would be random: "
            "give a trained reward model"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"reward.models: the tokenizer of {path} has neither a PAD nor an EOS token: add a PAD token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    # Decoder classifiers read their score at the last token that is not PAD: both must mean the same token.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.to(device).eval().requires_grad_(False)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < 10**9]
    return RewardModel(
        name=name or path.rstrip("/").rpartition("/")[2],
        model=model,
        tokenizer=tokenizer,
        max_length=min(limits, default=None),
    )
