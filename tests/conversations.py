"""Episodes of several turns out of made-up tokens, and what a model says of them token by token, by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import tiny
from cagsr.flow import Context, EncodedPrompt, Episode, EpisodeBatch, Prompt, PromptBatch, Segment


def conversations(
    prompts: Sequence[int],
    group: Sequence[int],
    lengths: Sequence[Sequence[int]],
    *,
    vocabulary: int = 28,
    seed: int = 1,
) -> EpisodeBatch:
    """Episodes of random tokens, prompts padded on the left.

    Args:
        prompts: tokens of each prompt.
        group: the prompt of each episode.
        lengths: of each episode the tokens of its segments: answer, reply, answer, reply ... answer.
        vocabulary: tokens from 3 up to this one.
        seed: of the tokens.

    Every other token of a prompt and of each segment, from the second on (of one token that one), is a piece of its one
    salient word, of weight 1, 2, 3 ... in their order. Texts are what the tiny tokenizer reads in the tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    def text_of(ids: tuple[int, ...]) -> str:
        return "".join(f" {[*tiny.SPECIAL, *tiny.WORDS][token]}" for token in ids)

    def words(count: int) -> tuple[int, ...]:
        return tuple(0 if place % 2 or count == 1 else -1 for place in range(count))

    encoded = [
        EncodedPrompt(Prompt(row, text_of(ids := tokens(size)).strip()), ids, words(size), (1.0,))
        for row, size in enumerate(prompts, 1)
    ]
    episodes = []
    for row, sizes in zip(group, lengths, strict=True):
        segments = [
            Segment(
                said := tokens(size),
                text_of(said),
                "user" if place % 2 else "assistant",
                turn=(place + 1) // 2,
                sampled=place % 2 == 0,
                words=words(size),
                salience=(2.0 + place,),
            )
            for place, size in enumerate(sizes)
        ]
        episodes.append(Episode(encoded[row], tuple(segments), ended=True))
    return batch_of(episodes, group)


def batch_of(episodes: Sequence[Episode], group: Sequence[int]) -> EpisodeBatch:
    """Pad episodes by hand: of each prompt and segment the salient words follow each other in their order."""
    count, width = len(episodes), max(len(one.first.ids) for one in episodes)
    longest = max(sum(len(part.ids) for part in one.segments) for one in episodes)
    most = max(len(one.first.salience) + sum(len(part.salience) for part in one.segments) for one in episodes)
    ids, words = torch.zeros(count, width + longest, dtype=torch.long), torch.full((count, width + longest), -1)
    real, sampled = (torch.zeros(count, width + longest, dtype=torch.bool) for _ in range(2))
    turn, salience = torch.zeros(count, longest, dtype=torch.long), torch.zeros(count, most)
    word_turn = torch.zeros(count, most, dtype=torch.long)
    for row, episode in enumerate(episodes):
        place, number = width - len(episode.first.ids), 0
        for part in (episode.first, *episode.segments):
            for token, word in zip(part.ids, part.words, strict=True):
                ids[row, place], real[row, place] = token, True
                words[row, place] = word + number if word >= 0 else -1
                if isinstance(part, Segment):
                    sampled[row, place], turn[row, place - width] = part.sampled, part.turn
                place += 1
            for weight in part.salience:
                salience[row, number] = weight
                if isinstance(
                    part, Segment
                ):  # what was said in a turn is seen from the next one on, what was read in it
                    word_turn[row, number] = part.turn + part.sampled
                number += 1
    own = max(len(one.first.salience) for one in episodes)
    prompts = PromptBatch(
        tuple(one.first.prompt for one in episodes),
        ids[:, :width],
        real[:, :width],
        words[:, :width],
        torch.stack(
            [torch.tensor([*one.first.salience, *[0.0] * (own - len(one.first.salience))]) for one in episodes]
        ),
        torch.tensor(group),
    )
    return EpisodeBatch(
        prompts,
        ids[:, width:],
        real[:, width:],
        sampled[:, width:],
        turn,
        torch.tensor([one.ended for one in episodes]),
        tuple(one.answers[-1] for one in episodes),
        context=Context(words, salience, word_turn, tuple(episodes)),
    )


def token_by_token(model: Any, episodes: EpisodeBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and attention maps of sampled tokens, a forward without a cache and without padding for each.

    Args:
        model: with eager attention.
        episodes: prompts padded on the left.

    Returns:
        ``(batch, response)``, and ``(batch, response, prompt + response)`` averaged over layers and heads; of the
        response's columns those of salient words alone.
    """
    width = episodes.prompts.ids.shape[1]
    logprobs = torch.zeros(episodes.ids.shape)
    maps = torch.zeros(*episodes.ids.shape, width + episodes.ids.shape[1])
    for row, column in episodes.sampled.nonzero().tolist():
        prompt = episodes.prompts.ids[row][episodes.prompts.real[row]]
        before = torch.cat([prompt, episodes.ids[row, :column]])[None]
        with torch.no_grad():
            found = model(input_ids=before, output_attentions=True, use_cache=False)
        logprobs[row, column] = found.logits[0, -1].log_softmax(-1)[episodes.ids[row, column]]
        seen = torch.stack(found.attentions).mean(dim=(0, 2))[0, -1]
        maps[row, column, width - len(prompt) : width + column] = seen
    if episodes.context is not None:
        maps[:, :, width:].masked_fill_((episodes.context.words[:, width:] < 0)[:, None], 0.0)
    return logprobs, maps
